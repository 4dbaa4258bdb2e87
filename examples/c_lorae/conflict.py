"""The conflict dial: does a mixture gain more over one LoRA, the more the tasks disagree?

    python -m examples.c_lorae.conflict --tune      # each arm's rate, into conflict_rates.json
    python -m examples.c_lorae.conflict --out build/conflict

Six numbered questions on one pool of words (examples/c_lorae/questions.py); none, one, two or all of the
last three swap yes and no.  Protocol and results: docs/conflict.md.
"""

import copy
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from examples.c_lorae import conflict_report, learning, questions
from examples.c_lorae.encoder import Encoder, Items
from examples.common import evidence

STEPS, EACH = 150, 4  # items of each question per step
LONG = conflict_report.LONG
RATES = Path(__file__).with_name("conflict_rates.json")
LONG_RATES = Path(__file__).with_name("conflict_long_rates.json")
GRID, LONG_GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (5e-4, 1e-3, 2e-3)
TUNING_SEEDS, SEEDS = [100, 101], [0, 1, 2, 3, 4]
LOOKS = 5  # evaluations per run, evenly spaced; for one LoRA, gradients are recorded too
ARMS = {
    name: arm
    for name, arm in learning.arms_of(questions.QUESTIONS).items()
    if name != "C-LoRAE without mutual information"
}


class Study:
    """The items, encoded once; `at` returns them at a point of the dial."""

    def __init__(self, steps=STEPS, train=4000, validation=120, test=200):
        self.steps, self.encoder = steps, Encoder(questions.ANSWERS)
        sizes = {"train": train, "validation": validation, "test": test}
        self.items = {
            split: Items(self.encoder, questions.load(split, most)) for split, most in sizes.items()
        }

    def at(self, swapped, split):
        items = copy.copy(self.items[split])
        items.wanted = questions.swap(items.wanted, items.tasks, swapped)
        return items


def trained(study, key, rate, seed, watch=None):
    arm, swapped, times = conflict_report.parted(key)
    arm, _, _ = arm.partition(" at ")
    items = study.at(swapped, "train")
    batches = learning.balanced(items, times * study.steps, EACH, seed)
    learner = learning.Learner(ARMS[arm], study.encoder, seed)
    return learning.train(learner, items, batches, rate, watch=watch)


def tuned(study, name, rate, seed):
    """{"score": mean validation accuracy at both ends of the dial}; longer arms use only the far end."""
    arm, first, last = conflict_report.LONGER.get(name), questions.DIAL[0], questions.DIAL[-1]
    points = [(arm, last, LONG)] if arm else [(name, first, 1), (name, last, 1)]
    scores = []
    for arm, swapped, times in points:
        learner = trained(study, conflict_report.key(arm, swapped, times), rate, seed)
        scores.append(np.mean(learning.right(learner, study.at(swapped, "validation"))))
    return {"score": float(np.mean(scores))}


def run(study, rates, key, seed):
    """Trains an arm at a point of the dial; returns its correct test items, curve and gradient cosines."""
    arm, swapped, times = conflict_report.parted(key)
    validation, test = study.at(swapped, "validation"), study.at(swapped, "test")
    curve, looks, every = [], [], max(1, times * study.steps // LOOKS)

    def watch(learner, step, losses, tasks):
        if step % every:
            return
        curve.append(float(np.mean(learning.right(learner, validation))))
        learner.model.train()
        if arm == learning.ONE:
            looks.append(gradients(learner, losses, tasks))

    _, _, rate = arm.partition(" at ")
    rate = float(rate or rates[arm if times == 1 else conflict_report.longer(arm)])
    learner = trained(study, key, rate, seed, watch)
    curve.append(float(np.mean(learning.right(learner, validation))))
    found = {"right": learning.right(learner, test), "curve": curve, "gradients": looks}
    found["experts"] = sum(p.numel() for p in learner.parameters())
    if arm.startswith("C-LoRAE"):
        found["universal"] = learning.right(learner, test, universal=True)
    return found


def gradients(learner, losses, tasks):
    """Cosine of each pair of the questions' gradients over the experts; ratio of largest to smallest norm."""
    each = []
    for task in tasks.unique():
        loss = losses[tasks == task].mean()
        of_task = torch.autograd.grad(loss, learner.parameters(), retain_graph=True)
        each.append(torch.cat([g.flatten() for g in of_task]))
    norms = torch.stack([g.norm() for g in each])
    pairs = combinations(range(len(each)), 2)
    cosines = [float(torch.cosine_similarity(each[i], each[j], 0)) for i, j in pairs]
    return {"cosines": cosines, "norm ratio": float(norms.max() / norms.min())}


def tune(args, study, path, long_path):
    seeds = TUNING_SEEDS[:1] if args.quick else TUNING_SEEDS
    for into, names, grid in ((path, ARMS, GRID), (long_path, conflict_report.LONGER, LONG_GRID)):
        grid, work = grid[:1] if args.quick else grid, partial(tuned, study)
        evidence.tune(args.out, into, names, grid, seeds, work, args.processes, setting=args.quick)


def main(argv=None):
    parser = evidence.parser(__doc__, "build/conflict")
    parser.set_defaults(seeds=SEEDS)
    parser.add_argument("--tune", action="store_true", help="only find each arm's rate")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    study = Study(5, 60, 12, 12) if args.quick else Study()
    paths = [args.out / path.name if args.quick else path for path in (RATES, LONG_RATES)]
    if args.tune or (args.quick and not all(path.exists() for path in paths)):
        tune(args, study, *paths)
    if args.tune:
        print(*map(evidence.tuning, paths), sep="\n\n")
        return
    seeds = args.seeds[:1] if args.quick else args.seeds
    keys = [conflict_report.key(arm, at) for at in questions.DIAL for arm in ARMS]
    longer = conflict_report.LONGER.values()
    keys += [conflict_report.key(arm, questions.DIAL[-1], LONG) for arm in longer]
    rates = evidence.rates(paths[0]) | evidence.rates(paths[1])
    keys += [conflict_report.key(arm, at) for at in questions.DIAL for arm in conflict_report.RATED]
    work, setting = partial(run, study, rates), {"quick": args.quick, "rates": rates}
    found = evidence.runs(args.out, keys, seeds, work, args.processes, setting=setting)
    text = conflict_report.markdown(found, list(ARMS), seeds)
    text += "\n\n" + evidence.setting(seeds, started)
    (args.out / "report.md").write_text(text + "\n")
    conflict_report.draw(args.out / "dial.png", found, list(ARMS), seeds)
    print(text)


if __name__ == "__main__":
    main()
