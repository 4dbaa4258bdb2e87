import json
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_moe import disable_adapters, load_adapter

base = "HuggingFaceTB/SmolLM2-135M"
tokenizer = AutoTokenizer.from_pretrained(base)
model = load_adapter(AutoModelForCausalLM.from_pretrained(base), "out/trainer")
lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)

rows = [
    {"text": "the cat sees a red", "choices": ["bird", "today"], "answer": 0},
    {"text": "a dog likes the small", "choices": ["or", "house"], "answer": 1},
] * 8
Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
task = {
    "task": "next_word", "output_type": "multiple_choice", "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test",
    "doc_to_text": "{{text}}", "doc_to_choice": "choices", "doc_to_target": "answer",
}  # fmt: skip
with_experts = simple_evaluate(lm, tasks=[task])["results"]  # or tasks=["arc_easy", "gsm8k"]
with disable_adapters(model):
    without = simple_evaluate(lm, tasks=[task])["results"]
print(with_experts, without)
