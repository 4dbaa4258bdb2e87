"""Writes what a server needs: the base model, an adapter, and questions with the answers of transformers.

    python -m examples.serving.export --adapter build/demo/adapter --out build/demo-vllm

uses the adapter that `make demo` saved, or trains one for a few steps if there is none.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_moe
from examples.common import peers, smollm2, tasks
from examples.demo.learning import PER_TASK, SEED, train

ASKED = 6  # held-out items of each of the three tasks
NEW = 8  # tokens per answer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("build/demo/adapter"))
    parser.add_argument("--out", type=Path, default=Path("build/demo-vllm"))
    parser.add_argument(
        "--steps", type=int, default=20, help="training steps if there is no adapter"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
    save_base(model, tokenizer, args.out / "base")
    three = tasks.load_tasks()
    adapter = args.adapter
    if not adapter.exists():
        adapter = args.out / "adapter"
        if not adapter.exists():
            print(f"no adapter in {args.adapter}: training one for {args.steps} steps")
            batches = list(tasks.batches(three, tokenizer, args.steps, PER_TASK, SEED))
            tuned = peers.ours(model, peers.start_weights(model, SEED))
            list(train(tuned, batches))  # runs the steps
            lora_moe.save_adapter(tuned, adapter)
    model = lora_moe.load_adapter(smollm2.load_model(), adapter).eval()
    questions = [
        (task.name, task.prompt(s), want) for task in three for s, want in task.heldout[:ASKED]
    ]
    answers = [answer(model, tokenizer, prompt) for _, prompt, _ in questions]
    asked = {
        "base": str((args.out / "base").resolve()),
        "adapter": str(adapter.resolve()),
        "new": NEW,
        "questions": [
            {"task": task, "prompt": prompt, "wanted": want, "answer": said}
            for (task, prompt, want), said in zip(questions, answers)
        ],
    }
    (args.out / "asked.json").write_text(json.dumps(asked, indent=1))


def save_base(model, tokenizer, folder):
    """Saves the model as a plain Llama checkpoint: vLLM cannot read the file the weights came from."""
    fields = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def answer(model, tokenizer, prompt):
    """Token ids of the greedy answer, without the end token."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=NEW, do_sample=False)
    ids = out[0, ids["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


if __name__ == "__main__":
    main()
