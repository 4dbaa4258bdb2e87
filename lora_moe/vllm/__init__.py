"""vLLM plugin that serves a saved mixture of LoRA experts on one or more GPUs.

    vllm serve BASE --load-format lora_moe --additional-config '{"lora_moe": {"adapter": DIR}}'

vLLM finds `register` through the entry point `vllm.general_plugins`.  Only `loader` and `method`, which run
inside vLLM, import it at module level.  docs/serving.md describes what is supported and how it scales.
"""

LOAD_FORMAT = "lora_moe"


def register() -> None:
    """Register the load format `lora_moe`; vLLM calls this in each of its processes."""
    from vllm.model_executor.model_loader import register_model_loader

    from .loader import LoraMoeLoader

    register_model_loader(LOAD_FORMAT)(LoraMoeLoader)


__all__ = ["LOAD_FORMAT", "register"]
