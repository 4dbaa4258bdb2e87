"""SmolLM2-135M learns three small tasks with a mixture of LoRA experts in each of its linears.

    python -m examples.demo --out build/demo

trains, then puts our layer beside a loop over experts, dense stacked matmuls and PEFT LoRA: the
same losses and gradients, step time, memory.  Writes OUT/report.md, OUT/results.json, four pictures
and the adapter.  Ends with an error that names the claim if a claim of correctness fails; times are
printed and decide nothing.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import lora_moe
from benchmarks import machine, timing
from examples.common import figures, measure, peers, smollm2, tasks, training
from examples.demo import report
from examples.demo.agreement import follow
from examples.demo.reload import logits_of

SEED = 0
LEARNING_RATE = 1e-3
PER_TASK = 8  # items of each task in a step: about 500 tokens
COMPARED = 20  # steps that the loop trains beside ours


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
    trace = train(tuned, batches)
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
        prog="python -m examples.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="folder for the results"
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


def look(model, tokenizer, three, when):
    """Held-out accuracy of each task, and what the model says to one item of each."""
    bar = tqdm(three, f"held-out, {when}")
    right = [training.accuracy(model, tokenizer, task) for task in bar]
    shown = [task.prompt(task.heldout[2][0]) for task in three]
    answers = [training.answer(model, tokenizer, prompt) for prompt in shown]
    wanted = [task.heldout[2][1] for task in three]
    return {"accuracy": right, "prompts": shown, "answers": answers, "wanted": wanted}


def trainer(model, steps, penalty):
    """step(number, batch) -> loss; ours and the loop are trained by this same function."""
    optimizer = training.optimizer_of(model, LEARNING_RATE)

    def step(number, batch):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * training.rate_at(number, steps)
        return training.train_step(model, optimizer, batch, penalty)

    return step


def train(model, batches):
    """Returns (loss, routing decisions) a step; the decisions of the first steps only."""
    step, trace = trainer(model, len(batches), lora_moe.aux_loss), []
    bar = tqdm(batches, "ours")
    for number, batch in enumerate(bar):
        loss = step(number, batch)
        trace.append((loss, peers.decisions(model) if number < COMPARED else None))
        bar.set_postfix(loss=f"{loss:.3f}")
    return trace


def compare(model, start, twin, batches, trace, args):
    """The loop's training beside ours; `twin` lends its layers, its weights are overwritten."""
    loop = peers.loop(model, start)
    compared = batches[:COMPARED]
    checked = {0, len(compared) // 2, len(compared) - 1}
    step = trainer(loop, args.steps, peers.balance)
    return follow(loop, twin, compared, step, trace, checked)


@torch.no_grad()
def expert_load(model, tokenizer, three):
    """{kind of linear: (layers, tasks, E)}: the share of the slots of a task's tokens, padding left out."""
    layers = peers.mixtures(model)
    load = {kind: [] for kind in peers.TARGETS}
    for task in three:
        rows = [tokenizer.encode(task.prompt(subject)) for subject, _ in task.heldout[:64]]
        ids = tasks.pad(rows, -1)  # (N, L)
        model.model(input_ids=ids.clamp(min=0), use_cache=False)
        chosen = {n: layer.routing.indices[ids.flatten() >= 0] for n, layer in layers.items()}
        for kind in load:
            load[kind].append(
                torch.stack([share(i) for n, i in chosen.items() if n.endswith(kind)])
            )
    return {kind: torch.stack(by_task, dim=1) for kind, by_task in load.items()}


def share(indices):
    """(E,): which share of the slots each expert has."""
    return torch.bincount(indices.flatten(), minlength=peers.NUM_EXPERTS) / indices.numel()


def most_telling(load):
    """The kind of linear whose routing differs most between the tasks."""
    return max(
        load, key=lambda kind: (load[kind] - load[kind].mean(dim=1, keepdim=True)).abs().sum()
    )


def save_and_reload(model, tokenizer, three, args):
    """Saves the adapter, loads it in a new process, compares the logits bit by bit."""
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


def cost(model, start, batch, rounds):
    """{contender: seconds, saved bytes above the un-adapted model, peak bytes} of a training step."""
    contenders = {
        "ours": peers.ours(model, start),
        "dense stacked": peers.stacked(model, start),
        "loop over experts": peers.loop(model, start),
        "PEFT LoRA, r=16": peers.peft_lora(model, SEED),
    }
    plain = measure.saved_bytes_unadapted(model, batch)
    saved = {name: measure.saved_bytes(m, batch) - plain for name, m in contenders.items()}
    steps = {
        name: partial(training.train_step, m, training.optimizer_of(m, LEARNING_RATE), batch)
        for name, m in contenders.items()
    }
    seconds = timing.interleave(steps, rounds, timing.once, laggard=math.inf)
    measure.return_memory_at_once()
    peak = {name: measure.peak_bytes(step) for name, step in tqdm(steps.items(), "memory")}
    rows = {
        name: {"seconds": seconds[name], "saved_bytes": saved[name], "peak_bytes": peak[name]}
        for name in contenders
    }
    return {"tokens": batch[0].numel(), "unadapted_saved_bytes": plain, "contenders": rows}


def draw(out, found, load):
    """The four pictures."""
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
