import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from lora_moe import LoraMoeConfig, inject
from lora_moe.hf import LoraMoeTrainerMixin


class MoeDPOTrainer(LoraMoeTrainerMixin, DPOTrainer):
    pass


base = "HuggingFaceTB/SmolLM2-135M"
model = AutoModelForCausalLM.from_pretrained(base)
inject(model, LoraMoeConfig(num_experts=8, r=8, top_k=2, target_modules="all-linear"))

rows = {"prompt": "the cat", "chosen": " sees a bird", "rejected": " or or or"}
args = DPOConfig(
    "out/dpo", max_steps=4, per_device_train_batch_size=2, logging_steps=1,
    use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
# without ref_model, the reference is the model with its experts disabled
trainer = MoeDPOTrainer(model=model, args=args, train_dataset=Dataset.from_list([rows] * 16))
trainer.train()
trainer.save_model()
