"""Whole published systems on the kernels of this package, one file a paper.

Nothing here is imported by `import lora_moe`; import the file you want:

    c_lorae      collaborative multi-LoRA experts and the achievement-based loss (arXiv 2505.06303)
    mmolre       multimodal mixture of low-rank experts (arXiv 2505.14143)
    branch_lora  continual instruction tuning by branches (arXiv 2506.02041)
"""
