"""SmolLM2-135M learns two small tasks in a minute or two, with LoRA experts in its upper layers.

    python -m examples.demo --out build/demo

Eight experts of rank 8, two per token, on each linear of the last ten of 30 layers; nothing below
needs a gradient, which halves the time of a step.  Prints held-out accuracy and answers before and
after training, and writes OUT/adapter and OUT/accuracy.png.  The third task of the full demo, emoji,
needs more training than that.
"""

import argparse
import time
from pathlib import Path

import torch

from examples.common import figures, smollm2, tasks
from examples.demo import report
from examples.demo.learning import PER_TASK, SEED, look, train
from lora_moe import LoraMoeConfig, backend_info, inject, injected, save_adapter

CONFIG = LoraMoeConfig(
    num_experts=8,
    r=8,
    top_k=2,
    alpha=16,
    target_modules=r"model\.layers\.2\d\.(self_attn|mlp)\..*_proj",
    balance_coef=1.0,  # high, since the routers have only a few dozen steps
)
ASKED = range(3)  # indices of each task's held-out items
NEXT = """  accuracy.png  this table as a plot
  adapter/      for lora_moe.load_adapter and `make demo-vllm`, which serves it; its README.md names
                the model, the data and their licenses
Next: README.md, and `make demo-full`: experts in every layer, compared with other implementations"""


def main():
    args = parse()
    started = time.perf_counter()
    print("SmolLM2-135M-Instruct learns the sentiment and emotion of words. Loading it ...")
    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
    learned = tasks.load_tasks(args.heldout)[:2]
    before = look(model, tokenizer, learned, "untuned", ASKED)
    torch.manual_seed(SEED)
    inject(model, CONFIG)
    print(_experts(model))
    batches = list(tasks.batches(learned, tokenizer, args.steps, PER_TASK, SEED))
    list(train(model, batches))  # runs the steps
    after = look(model, tokenizer, learned, "tuned", ASKED)
    save_adapter(model, args.out / "adapter")
    (args.out / "adapter/README.md").write_text(report.model_card())
    rows = [
        (task.name, untuned, tuned, task.majority())
        for task, untuned, tuned in zip(learned, before["accuracy"], after["accuracy"])
    ]
    figures.draw_accuracy(args.out / "accuracy.png", rows)
    print(_summary(rows, before, after))
    backend = backend_info()["serving"]["cpu"]
    print(
        f"\n{(time.perf_counter() - started) / 60:.1f} minutes, backend {backend}. In {args.out}:"
    )
    print(NEXT)


def parse():
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="output folder")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--heldout", type=int, default=100, help="held-out items of each task")
    return parser.parse_args()


def _experts(model):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in model.parameters())
    return (
        f"Added {CONFIG.num_experts} experts of rank {CONFIG.r} to each of {len(injected(model))} linears,"
        f" {CONFIG.top_k} per token: {trained / 1e6:.1f} M parameters train, {share:.1%} of all."
    )


def _summary(rows, before, after):
    """The accuracies and some answers as text; rows: (task, untuned, tuned, majority)."""
    lines = ["", f"{'held-out accuracy':<18}{'untuned':>9}{'tuned':>9}{'majority class':>17}"]
    for name, untuned, tuned, majority in rows:
        lines.append(f"{name:<18}{untuned:>9.1%}{tuned:>9.1%}{majority:>17.1%}")
    rows = [("held-out word", "data", "tuned says", "untuned says")]
    columns = after["prompts"], after["wanted"], before["answers"], after["answers"]
    for prompt, wanted, untuned, tuned in zip(*columns):
        rows.append((prompt.split("\n")[0], wanted, _short(tuned), _short(untuned)))
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    lines += ["", *("".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
    return "\n".join(lines)


def _short(text, width=30):
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
