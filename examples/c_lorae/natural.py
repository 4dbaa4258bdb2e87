"""Seven real tasks at once: does C-LoRAE beat one LoRA if tasks share words and answers and clash a little?

    python -m examples.c_lorae.natural --tune       # each arm's rate, into natural_rates.json
    python -m examples.c_lorae.natural --out build/natural

The tasks of examples/branch_lora/tasks.py are trained together, in proportion to their items (19 % to 4 %);
held-out items come with unseen instructions.  Protocol and results: docs/natural.md.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from examples.branch_lora import tasks as seven
from examples.c_lorae import learning, natural_report
from examples.c_lorae.encoder import Encoder, Items
from examples.common import evidence

STEPS, BATCH, TRAIN, ASKED = 150, 32, 2000, 100  # TRAIN, ASKED: maximum items per task
RATES = Path(__file__).with_name("natural_rates.json")
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEEDS, SEEDS = [100, 101], [0, 1, 2, 3, 4]


class Study:
    """The seven tasks' items, encoded once."""

    def __init__(self, steps=STEPS, train=TRAIN, asked=ASKED):
        self.steps, self.tasks = steps, seven.load_tasks()
        self.encoder = Encoder({answer for task in self.tasks for answer in task.answers})
        self.train = Items(self.encoder, self.rows("train", train))
        self.validation = Items(self.encoder, self.rows("validation", asked))
        self.test = Items(self.encoder, self.rows("test", asked))
        self.arms = learning.arms_of(len(self.tasks))

    def rows(self, split, most):
        """[(task, text, answer)]; items cycle through the split's instructions."""
        return [
            (number, text, answer)
            for number, task in enumerate(self.tasks)
            for text, answer in task.fixed(split, most)
        ]

    def trained(self, arm, rate, seed, **how):
        batches = learning.proportional(self.train, self.steps, BATCH, seed)
        learner = learning.Learner(arm, self.encoder, seed)
        return learning.train(learner, self.train, batches, rate, **how)


def mean_of_tasks(right, items):
    return float(np.mean(learning.by_task(right, items.tasks)))


def tuned(study, arm, rate, seed):
    learner = study.trained(study.arms[arm], rate, seed)
    right = learning.right(learner, study.validation)
    return {"score": mean_of_tasks(right, study.validation)}


def run(study, rates, arm, seed):
    learner = study.trained(study.arms[arm], rates[arm], seed)
    found = {"right": learning.right(learner, study.test)}
    found["experts"] = sum(p.numel() for p in learner.parameters())
    if study.arms[arm].negatives or arm.startswith("C-LoRAE"):
        found["universal"] = learning.right(learner, study.test, universal=True)
    return found


def main(argv=None):
    parser = evidence.parser(__doc__, "build/natural")
    parser.set_defaults(seeds=SEEDS)
    parser.add_argument("--tune", action="store_true", help="only find each arm's rate")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    study = Study(4, 40, 6) if args.quick else Study()
    path = args.out / RATES.name if args.quick else RATES
    if args.tune or (args.quick and not path.exists()):
        seeds, grid = (TUNING_SEEDS[:1], GRID[:1]) if args.quick else (TUNING_SEEDS, GRID)
        work = partial(tuned, study)
        evidence.tune(
            args.out, path, study.arms, grid, seeds, work, args.processes, setting=args.quick
        )
    if args.tune:
        print(evidence.tuning(path))
        return
    seeds = args.seeds[:1] if args.quick else args.seeds
    rates = evidence.rates(path)
    work, setting = partial(run, study, rates), {"quick": args.quick, "rates": rates}
    found = evidence.runs(args.out, study.arms, seeds, work, args.processes, setting=setting)
    text = natural_report.markdown(study, found, seeds)
    text += "\n\n" + evidence.setting(seeds, started)
    text += "\n\n" + "\n".join(f"- {source}" for source in seven.SOURCES)
    (args.out / "report.md").write_text(text + "\n")
    natural_report.draw(args.out / "natural.png", study, found, seeds)
    print(text)


if __name__ == "__main__":
    main()
