import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from lora_moe import LoraMoeConfig, inject
from lora_moe.hf import LoraMoeTrainerMixin


class MoeSFTTrainer(LoraMoeTrainerMixin, SFTTrainer):
    pass


base = "HuggingFaceTB/SmolLM2-135M"
four_bit = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit)
# prepare_model_for_kbit_training is not needed: inject freezes the base, and experts are fp32
inject(model, LoraMoeConfig(num_experts=8, r=8, top_k=2, target_modules="all-linear"))

texts = ["the cat sees a red bird", "a dog likes the small house and the tree"] * 16
args = SFTConfig(
    "out/qlora", max_steps=4, max_length=32, logging_steps=1, use_cpu=not torch.cuda.is_available()
)
trainer = MoeSFTTrainer(model=model, args=args, train_dataset=Dataset.from_dict({"text": texts}))
trainer.train()
trainer.save_model()
