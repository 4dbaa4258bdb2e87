"""SmolLM2-135M learns three small tasks with a mixture of LoRA experts in each of its linears.

    python -m examples.demo.full --out build/demo-full

trains, then compares our layer with a loop over experts, dense stacked matmuls and PEFT LoRA: losses,
gradients, step time and memory.  Writes OUT/report.md, OUT/results.json, four plots and the adapter.
Exits with an error that names the claim if a claim of correctness fails; times are reported only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lora_moe
from benchmarks import machine
from examples.common import figures, peers, smollm2, tasks
from examples.demo import report
from examples.demo.agreement import follow
from examples.demo.cost import cost
from examples.demo.learning import PER_TASK, SEED, look, train, trainer
from examples.demo.load import expert_load, most_telling
from examples.demo.reload import logits_of

COMPARED = 20  # steps in which the loop is trained and compared


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found = {"machine": machine.describe(), "backend": lora_moe.backend_info()["serving"]["cpu"]}
    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model(args.layers)
    three = tasks.load_tasks(args.heldout)
    start = peers.start_weights(model, SEED)
    batches = list(tasks.batches(three, tokenizer, args.steps, PER_TASK, SEED))

    found["tasks"] = [describe(task) for task in three]
    found["before"] = look(model, tokenizer, three, "untuned")
    tuned = peers.ours(model, start)
    trace = [  # the routing decisions of the compared steps only
        (loss, peers.decisions(tuned) if number < COMPARED else None)
        for number, loss in enumerate(train(tuned, batches))
    ]
    found["loss"] = [loss for loss, _ in trace]
    found["after"] = look(tuned, tokenizer, three, "tuned")
    load = expert_load(tuned, tokenizer, three)
    found["reload"] = save_and_reload(tuned, tokenizer, three, args)
    found["agreement"] = compare(model, start, tuned, batches, trace, args)
    found["cost"] = cost(model, start, batches[0], args.rounds)
    found["claims"] = report.claims(found, learned=not args.quick)
    draw(args.out, found, load)
    found["seconds"] = time.perf_counter() - started
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    text = report.markdown(found)
    (args.out / "report.md").write_text(text)
    print(text)
    failed = [c for c in found["claims"] if c["decides"] and c["holds"] is False]
    sys.exit("\n".join(f"claim failed: {c['text']}: {c['measured']}" for c in failed) or None)


def parse():
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.full", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo-full"), help="folder for the results"
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--quick", action="store_true", help="a smoke test: four layers, few steps")
    args = parser.parse_args()
    args.heldout, args.rounds, args.layers = (8, 1, 4) if args.quick else (200, 5, None)
    args.steps = min(args.steps, 3) if args.quick else args.steps
    return args


def describe(task):
    sizes = {"train": len(task.train), "heldout": len(task.heldout)}
    return {"name": task.name, "labels": task.labels, "majority": task.majority(), **sizes}


def compare(model, start, twin, batches, trace, args):
    """The results of agreement.follow; the weights of `twin` are overwritten."""
    loop = peers.loop(model, start)
    compared = batches[:COMPARED]
    checked = {0, len(compared) // 2, len(compared) - 1}
    step = trainer(loop, args.steps, peers.balance)
    return follow(loop, twin, compared, step, trace, checked)


def save_and_reload(model, tokenizer, three, args):
    """Saves the adapter, loads it in a new process, and compares the logits bit for bit."""
    adapter = args.out / "adapter"
    lora_moe.save_adapter(model, adapter)
    (adapter / "README.md").write_text(report.model_card())
    ids, _ = tasks.encode(
        tokenizer, [(t.prompt(s), label) for t in three for s, label in t.heldout[:4]]
    )
    here = logits_of(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        sent, back = Path(folder) / "ids.safetensors", Path(folder) / "logits.safetensors"
        save_file({"ids": ids}, sent)
        command = [sys.executable, "-m", "examples.demo.reload", adapter.resolve(), sent, back]
        subprocess.run(
            [*command, str(args.layers or "")], check=True, cwd=Path(__file__).parents[2]
        )
        there = load_file(back)["logits"]
    size = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
    return {"equal": torch.equal(here, there), "bytes": size, "logits": here.numel()}


def draw(out, found, load):
    """Writes the four plots."""
    names = [task["name"] for task in found["tasks"]]
    before, after = found["before"]["accuracy"], found["after"]["accuracy"]
    majority = [task["majority"] for task in found["tasks"]]
    figures.draw_accuracy(out / "accuracy.png", list(zip(names, before, after, majority)))
    agreement = found["agreement"]
    shares = [count / agreement["decisions"] for count in agreement["free_flips"]]
    figures.draw_loss(out / "loss.png", found["loss"], agreement["loop"], shares)
    kind = most_telling(load)
    figures.draw_load(out / "experts.png", load[kind], names, kind)
    figures.draw_cost(out / "cost.png", report.cost_panels(found["cost"]["contenders"]))


if __name__ == "__main__":
    main()
