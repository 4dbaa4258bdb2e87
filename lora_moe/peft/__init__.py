"""Mixtures of LoRA experts as a method of PEFT.

    from peft import get_peft_model
    from lora_moe.peft import MoeLoraConfig

    model = get_peft_model(model, MoeLoraConfig(num_experts=8, r=8, target_modules=["q_proj", "v_proj"]))

Importing this package registers the method with PEFT; processes that load such an adapter must import it too.
"""

from .registration import register  # first: MoeLoraConfig uses the new member of PEFT's enum

from .config import MoeLoraConfig  # isort: skip
from .layer import MoeLoraLinear
from .model import MoeLoraModel

register(MoeLoraConfig, MoeLoraModel)

__all__ = ["MoeLoraConfig", "MoeLoraLinear", "MoeLoraModel"]
