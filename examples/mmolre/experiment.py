"""Tests the claims of MMoLRE's paper on four tasks with words and drawn kaomoji.

    python -m examples.mmolre --tune     tunes each arm's learning rate, writes rates.json next to this file
    python -m examples.mmolre            trains the arms at these rates, evaluates them on the test items
    python -m examples.mmolre --times    measures the time of one block

Protocol and results: docs/mmolre.md; the arms: examples/mmolre/arms.py; the data: data.py.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from examples.common import evidence
from examples.mmolre import blocks, data, report
from examples.mmolre.arms import ARMS, TASKS, build, parameters
from examples.mmolre.losses import constants, forward, item_losses, scales
from examples.mmolre.training import train
from lora_moe.methods.mmolre.affect import multilabel_metrics, sentiment_metrics

SEEDS, TUNING_SEEDS = [0, 1, 2, 3, 4], [100, 101]
GRID = (5e-4, 1e-3, 2e-3, 4e-3)
RATES = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Sizes:
    steps: int = 600
    batch: int = 64
    held_out: int = 1000  # maximum items per held-out split
    probe: int = 512  # training items used for gradient statistics
    words: int | None = None
    timed: tuple[int, int, int, int, int] = (768, 16, 8, 32, 9)  # width, rank, items, length, turns


QUICK = Sizes(steps=6, batch=8, held_out=150, probe=16, words=800, timed=(32, 4, 2, 8, 2))


class Study:
    """Sizes and data, encoded once; the same for every arm and seed, and shared by forked processes."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.words, self.kaomoji = data.load(most_words=sizes.words)
        parts = self.words, self.kaomoji
        self.validation, self.test = (
            data.held_out(*parts, split, sizes.held_out) for split in ("validation", "test")
        )
        (self.probe,) = data.training(*parts, 1, sizes.probe, seed=1000)
        labels = data.training_labels(*parts)
        self.scale, self.constants = scales(labels), constants(labels)
        self.labeled = {n: float(1 - of.isnan().float().mean()) for n, of in labels.items()}

    def train(self, arm, rate, seed, probe=None):
        """[(model, record of its training)] for the models of an arm."""
        arm, sizes = ARMS[arm], self.sizes
        rest = sizes.steps, rate, seed, self.scale, self.validation, probe
        return [
            train(
                partial(build, config, arm.one_fusion, arm.plain),
                data.training(self.words, self.kaomoji, sizes.steps, sizes.batch, seed),
                *rest,
            )
            for config in arm.models
        ]

    def judge(self, outputs):
        """{task: normalized losses of its labeled items, their mean, and the standard metrics}"""
        found, labels = {}, self.test.labels
        for name, losses in item_losses(outputs, labels).items():
            there = ~losses.isnan()
            metrics = sentiment_metrics if TASKS[name].loss == "mae" else multilabel_metrics
            output, label = outputs[name][there], labels[name][there]
            found[name] = metrics(output, label.view_as(output))
            found[name]["losses"] = (losses / self.scale[name]).tolist()  # (N,), NaN: missing
        return found


def run(study, rates, arm, seed):
    """Trains one arm from one seed and evaluates it on the test items."""
    probe = study.probe if arm == report.HARD else None
    started = time.process_time()
    trained = study.train(arm, rates[arm], seed, probe)
    seconds = time.process_time() - started
    outputs, validation, found = {}, {}, {}
    for model, happened in trained:
        with torch.no_grad():
            outputs |= forward(model, study.test)
        validation |= dict(happened["validation"])[happened["step"]]
        if arm == report.FIRST:
            found["own gates"] = own_gates(model, study.test)
    return found | {
        "tasks": study.judge(outputs),
        "validation": validation,
        "looks": [happened["validation"] for _, happened in trained],
        "steps": [happened["step"] for _, happened in trained],
        "gradients": trained[0][1]["gradients"],
        "parameters": sum(parameters(model) for model, _ in trained),
        "trained": seconds,
    }


def own_gates(model, items):
    """{task: mean gate of the task's own expert} over positions, blocks and modalities."""
    shares = [
        block.gates[:, items.masks[name]].mean(1)[:, block.shared :].diagonal()
        for name, blocks in model.encoders.items()
        for block in blocks
    ]
    return dict(zip(model.config.tasks, torch.stack(shares).mean(0).tolist()))


def tuning_run(study, arm, rate, seed):
    """Share of the constant predictor's validation loss that an arm saves, mean over the tasks."""
    losses = {}
    for _, happened in study.train(arm, rate, seed):
        losses |= dict(happened["validation"])[happened["step"]]
    return {"score": 1 - sum(losses.values()) / len(losses), "losses": losses}


def main(argv=None):
    parser = evidence.parser(__doc__, "build/mmolre")
    parser.set_defaults(seeds=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--tune", action="store_true", help="only tune the rates")
    parser.add_argument("--times", action="store_true", help="only measure the time of one block")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes, path = (QUICK, args.out / RATES.name) if args.quick else (Sizes(), RATES)
    if not (args.quick or args.tune or args.times or path.exists()):
        parser.error(f"{path.name} is missing: run with --tune first")
    if args.times:
        print(blocks.report(*sizes.timed))
    elif args.tune:
        tune(args, Study(sizes), path)
        print(evidence.tuning(path))
    else:
        compare(args, Study(sizes), path)


def tune(args, study, path):
    grid, seeds = (GRID[-1:], TUNING_SEEDS[:1]) if args.quick else (GRID, TUNING_SEEDS)
    run = partial(tuning_run, study)
    evidence.tune(args.out, path, ARMS, grid, seeds, run, args.processes, setting=args.quick)


def compare(args, study, path):
    if args.quick and not path.exists():
        tune(args, study, path)
    started, rates = time.perf_counter(), evidence.rates(path)
    each, setting = partial(run, study, rates), {"quick": args.quick, "rates": rates}
    found = evidence.runs(args.out, args.arms, args.seeds, each, args.processes, setting=setting)
    report.write(args, study, found, path, evidence.setting(args.seeds, started))
