"""Integration with transformers' Trainer and TRL.

    from lora_moe.hf import LoraMoeTrainer, LoraMoeTrainerMixin

    trainer = LoraMoeTrainer(model, args, train_dataset=data)      # model: after lora_moe.inject

    class MoeDPOTrainer(LoraMoeTrainerMixin, trl.DPOTrainer):      # any TRL trainer
        pass

Imported on first use of lora_moe.hf; requires transformers and accelerate.
"""

from .trainer import LoraMoeTrainer, LoraMoeTrainerMixin

__all__ = ["LoraMoeTrainer", "LoraMoeTrainerMixin"]
