"""Serve a saved mixture of LoRA experts in vLLM, on as many GPUs as it takes.

    vllm serve BASE --load-format lora_moe --additional-config '{"lora_moe": {"adapter": DIR}}'

vLLM finds `register` by the entry point `vllm.general_plugins`.  Nothing here imports vLLM before that, but
for `loader` and `method`, which are vLLM's side of it; docs/serving.md says what is served and how it scales.
"""

LOAD_FORMAT = "lora_moe"


def register() -> None:
    """Give vLLM the load format `lora_moe`; vLLM calls this in each of its processes."""
    from vllm.model_executor.model_loader import register_model_loader

    from .loader import LoraMoeLoader

    register_model_loader(LOAD_FORMAT)(LoraMoeLoader)


__all__ = ["LOAD_FORMAT", "register"]
