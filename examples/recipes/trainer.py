import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_moe import LoraMoeConfig, inject
from lora_moe.hf import LoraMoeTrainer

base = "HuggingFaceTB/SmolLM2-135M"
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(base)
inject(model, LoraMoeConfig(num_experts=8, r=8, top_k=2, target_modules="all-linear"))

texts = ["the cat sees a red bird", "a dog likes the small house and the tree"] * 16
args = transformers.TrainingArguments(
    "out/trainer", max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    learning_rate=2e-4, logging_steps=1, save_steps=4, report_to="tensorboard",
)  # fmt: skip
trainer = LoraMoeTrainer(
    model,
    args,
    train_dataset=[tokenizer(text) for text in texts],
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    router_learning_rate=1e-3,
    router_heatmap=True,  # out/trainer/router_history.png
)
trainer.train()  # resume_from_checkpoint=True resumes from out/trainer/checkpoint-*
trainer.save_model()  # out/trainer/lora_moe.safetensors
