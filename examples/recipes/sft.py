import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from lora_moe import LoraMoeConfig, inject
from lora_moe.hf import LoraMoeTrainerMixin


class MoeSFTTrainer(LoraMoeTrainerMixin, SFTTrainer):
    pass


base = "HuggingFaceTB/SmolLM2-135M"
model = AutoModelForCausalLM.from_pretrained(base)
inject(model, LoraMoeConfig(num_experts=8, r=8, top_k=2, target_modules="all-linear"))

texts = ["the cat sees a red bird", "a dog likes the small house and the tree"] * 16
args = SFTConfig(
    "out/sft", max_steps=4, max_length=32, packing=True, logging_steps=1,
    use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = MoeSFTTrainer(model=model, args=args, train_dataset=Dataset.from_dict({"text": texts}))
trainer.train()
trainer.save_model()  # out/sft/lora_moe.safetensors and the tokenizer
