"""The achievement loss in isolation: does it help the tasks that lag, and which part of it does?

    python -m examples.c_lorae.achievement --tune       # rates and potentials
    python -m examples.c_lorae.achievement --out build/achievement

C-LoRAE's experts learn the seven tasks of examples/c_lorae/natural.py in batches as unbalanced as the data;
the arms differ only in how a step's losses are weighted.  Protocol and results: docs/achievement.md.
"""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from examples.branch_lora.tasks import SOURCES
from examples.c_lorae import achievement_report, learning, natural
from examples.common import evidence
from lora_moe.methods.c_lorae import AchievementLoss

RATES = Path(__file__).with_name("achievement_rates.json")
POTENTIALS = Path(__file__).with_name("achievement_potentials.json")
UPDATES, MOMENTUM = 25, 0.3
ALONE, ALONE_RATE = 16, 2e-3  # batch size and rate of a single task's LoRA; best in natural.py
ARMS = {  # None: mean over items; "equal": mean of the tasks' means; else options of AchievementLoss
    "mean over items": None,
    "mean over tasks": "equal",
    "geometric mean": {"form": "geometric"},
    "achievement, geometric": {"form": "geometric"},
    "achievement, sum": {"form": "sum"},
    "achievement, weights / sum": {"form": "sum", "normalization": "sum"},
}
EXPERTS = "C-LoRAE"


class Weighing:
    """Computes a step's loss from its items' losses; also records weights and, if needed, evaluates tasks."""

    def __init__(self, study, arm, potentials):
        self.study, self.arm = study, arm
        options = ARMS[arm] if isinstance(ARMS[arm], dict) else {}
        self.loss = AchievementLoss(potentials, momentum=MOMENTUM, **options)
        self.measures, self.weights = "achievement" in arm, []

    def __call__(self, losses, tasks):
        if ARMS[self.arm] is None:
            return losses.mean()
        names = self.loss.tasks
        each = {names[t]: losses[tasks == t].mean() for t in tasks.unique().tolist()}
        if ARMS[self.arm] == "equal":
            return torch.stack(list(each.values())).mean()
        return self.loss(each)

    def update(self, learner):
        validation = self.study.validation
        right = learning.by_task(learning.right(learner, validation), validation.tasks)
        self.loss.update(dict(zip(self.loss.tasks, right)))
        self.weights.append(self.loss.weights().tolist())
        learner.model.train()


def trained(study, potentials, arm, rate, seed):
    weighing = Weighing(study, arm, potentials)
    every = max(1, study.steps // (UPDATES + 1))

    def watch(learner, step, *_):
        if weighing.measures and step and step % every == 0:
            weighing.update(learner)

    learner = study.trained(study.arms[EXPERTS], rate, seed, weigh=weighing, watch=watch)
    return learner, weighing.weights


def tuned(study, potentials, arm, rate, seed):
    learner, _ = trained(study, potentials, arm, rate, seed)
    right = learning.right(learner, study.validation)
    return {"score": natural.mean_of_tasks(right, study.validation)}


def alone(study, task, seed):
    """{"accuracy": of one LoRA trained on a single task, for as many steps, on its validation items}."""
    rows = (study.train.tasks == task).nonzero()[:, 0].tolist()
    order = learning.drawn(rows, study.steps * ALONE, f"alone {seed}")
    batches = [order[i * ALONE : (i + 1) * ALONE] for i in range(study.steps)]
    learner = learning.Learner(study.arms[learning.ONE], study.encoder, seed)
    learning.train(learner, study.train, batches, ALONE_RATE)
    right = learning.right(learner, study.validation)
    return {"accuracy": learning.by_task(right, study.validation.tasks)[task]}


def run(study, potentials, rates, arm, seed):
    learner, weights = trained(study, potentials, arm, rates[arm], seed)
    return {"right": learning.right(learner, study.test), "weights": weights}


def tune(study, args, folder):
    """Finds the potentials, then the rates, since some arms' rates depend on the potentials."""
    seeds = natural.TUNING_SEEDS[:1] if args.quick else natural.TUNING_SEEDS
    grid = natural.GRID[:1] if args.quick else natural.GRID
    numbers, work, processes = range(len(study.tasks)), partial(alone, study), args.processes
    found = evidence.runs(args.out, numbers, seeds, work, processes, "alone.jsonl", args.quick)
    potentials = {
        task.name: max(float(np.mean([found[number, seed]["accuracy"] for seed in seeds])), 0.01)
        for number, task in enumerate(study.tasks)
    }
    (folder / POTENTIALS.name).write_text(json.dumps(potentials, indent=1) + "\n")
    path, work = folder / RATES.name, partial(tuned, study, potentials)
    setting = {"quick": args.quick, "potentials": potentials}
    evidence.tune(args.out, path, ARMS, grid, seeds, work, processes, setting=setting)


def main(argv=None):
    parser = evidence.parser(__doc__, "build/achievement")
    parser.set_defaults(seeds=natural.SEEDS)
    parser.add_argument("--tune", action="store_true", help="only find the potentials and rates")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    study = natural.Study(4, 40, 6) if args.quick else natural.Study()
    folder = args.out if args.quick else RATES.parent
    if args.tune or (args.quick and not (folder / RATES.name).exists()):
        tune(study, args, folder)
    rates = evidence.rates(folder / RATES.name)
    potentials = json.loads((folder / POTENTIALS.name).read_text())
    if args.tune:
        print(potentials, evidence.tuning(folder / RATES.name), sep="\n\n")
        return
    seeds = args.seeds[:1] if args.quick else args.seeds
    work = partial(run, study, potentials, rates)
    setting = {"quick": args.quick, "rates": rates, "potentials": potentials}
    found = evidence.runs(args.out, ARMS, seeds, work, args.processes, setting=setting)
    text = achievement_report.markdown(study, found, potentials, seeds)
    text += "\n\n" + evidence.setting(seeds, started)
    text += "\n\n" + "\n".join(f"- {source}" for source in SOURCES)
    (args.out / "report.md").write_text(text + "\n")
    achievement_report.draw(args.out / "weights.png", study, found, seeds)
    print(text)


if __name__ == "__main__":
    main()
