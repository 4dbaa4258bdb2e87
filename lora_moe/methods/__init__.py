"""Complete published systems, built on this package's kernels.

Nothing here is imported by `import lora_moe`; import what you need:

    c_lorae      collaborative multi-LoRA experts (arXiv 2505.06303), with achievement (losses that balance
                 tasks), visual (image features for a model) and extraction (answers as text)
    mmolre       multimodal mixture of low-rank experts (arXiv 2505.14143), with affect (its metrics)
    branch_lora  continual instruction tuning by branches (arXiv 2506.02041), with continual (the task
                 selector, the metrics) and its state on disk
    equitable    task weights from loss over gradient norm (EMTL, arXiv 2306.09373)
"""
