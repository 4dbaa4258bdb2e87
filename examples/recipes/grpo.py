import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from lora_moe import LoraMoeConfig, inject
from lora_moe.hf import LoraMoeTrainerMixin


class MoeGRPOTrainer(LoraMoeTrainerMixin, GRPOTrainer):
    pass


def reward(completions, **_):
    return [float(text.count("cat")) for text in completions]


base = "HuggingFaceTB/SmolLM2-135M"
model = AutoModelForCausalLM.from_pretrained(base)
inject(model, LoraMoeConfig(num_experts=8, r=8, top_k=2, target_modules="all-linear"))

args = GRPOConfig(
    "out/grpo", max_steps=2, per_device_train_batch_size=4, num_generations=4,
    max_completion_length=8, beta=0.04, logging_steps=1, use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
data = Dataset.from_dict({"prompt": ["the dog sees", "a bird likes"] * 8})
trainer = MoeGRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=data)
trainer.train()
trainer.save_model()
