"""BranchLoRA and its baselines on a sequence of seven tasks, answered in words by a sentence encoder.

    python -m examples.branch_lora --tune                        writes examples/branch_lora/rates.json
    python -m examples.branch_lora --out build/branch_lora

Each arm learns the tasks of examples/branch_lora/tasks.py one after another, in each of three orders.
After each task it is evaluated on all tasks learned so far, without being told which task an item
belongs to.  Writes OUT/ORDER.jsonl (a restart resumes from it), OUT/report.md and plots.
The protocol is in docs/branch_lora.md.
"""

import functools
import json
import statistics
import time

import torch

from examples.branch_lora import arms, pictures, report
from examples.branch_lora.claims import claims
from examples.branch_lora.data import Data, mixed
from examples.branch_lora.steps import step_times
from examples.branch_lora.tasks import SOURCES, orders
from examples.common import evidence
from examples.common.training import optimizer_of, rate_at
from lora_moe.methods import branch_lora as bl
from lora_moe.methods.branch_lora.continual import TaskSelector

STEPS, ITEMS = 40, 80  # training steps and held-out items per task
SEEDS, TUNING_SEEDS = [0, 1, 2, 3, 4], [100, 101]


def run(data, order, settings, arm, seed, course=True):
    """Trains on the tasks in sequence; right[i][j]: which items of task j are correct after task i.

    Without `course`, the learner is evaluated only after the last task.
    """
    torch.manual_seed(seed)
    rate, strength = settings[arm]
    learner = arms.make(arm, data.targets, len(order), strength)
    lessons, asked = [data.batches[seed][t] for t in order], [data.asked[t] for t in order]
    if arm == "joint":
        lessons = [mixed(lessons, seed)]
    selector = TaskSelector(data.targets.shape[1])
    found = {"right": [], "trained": [], "loss": []}
    for i, batches in enumerate(lessons):
        learner.begin(batches), selector.begin_task()
        found["trained"].append(learner.trained())
        found["loss"].append(train(learner, batches, rate))
        learner.end(batches)
        for batch in batches:
            selector.observe(batch.frozen)
        last = i == len(lessons) - 1
        if course or last:
            known = asked if last else asked[: i + 1]
            found["right"].append([ask(learner, of_task, selector) for of_task in known])
    if learner.routes and course:
        found |= who_knows(learner, asked, selector)
    return found


def train(learner, batches, rate):
    """Trains on one task with a new optimizer; returns the mean loss of the last ten steps."""
    optimizer, losses = optimizer_of(learner.model, rate), []
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(number, len(batches))
        loss = learner.loss(number, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return statistics.mean(losses[-10:])


@torch.no_grad()
def ask(learner, batches, task_of):
    """Which items are answered correctly; an answer is the nearest among those of all tasks."""
    right = []
    for batch in batches:
        if learner.routes:
            learner.choose(task_of(batch.frozen))
        right += (learner.scores(batch).argmax(1) == batch.wanted).int().tolist()
    return right


def who_knows(learner, asked, selector):
    """Whether the selector is right for each item, and the correct answers with a perfect selector."""
    selected = [
        [int(task == j) for batch in of_task for task in selector(batch.frozen).tolist()]
        for j, of_task in enumerate(asked)
    ]
    oracle = [
        ask(learner, of_task, lambda frozen, j=j: torch.full((len(frozen),), j))
        for j, of_task in enumerate(asked)
    ]
    frozen = [len(layer.frozen) for layer in bl.branch_layers(learner.model).values()]
    return {"selected": selected, "oracle": oracle, "frozen": frozen}


def tune(args, path, size, grid, seeds):
    """Tunes each arm's settings by ACC on the validation items, in the first order."""
    items, steps, tasks = size
    data = Data("validation", items, steps, seeds, tasks)
    order = next(iter(orders(data.tasks).values()))

    def score(name, rate, seed):
        arm, strength = arms.parsed(name)
        found = run(data, order, {arm: (rate, strength)}, arm, seed, course=False)
        return {"score": statistics.mean(map(statistics.mean, found["right"][-1]))}

    evidence.tune(
        args.out, path, arms.tuned(), grid, seeds, score, args.processes, setting=args.quick
    )


def every_run(args, data, settings):
    """{order: {(arm, seed): run}}; joint training has no order and is stored under the first."""
    found = {}
    for name, order in orders(data.tasks).items():
        learned = arms.IN_A_ROW if found else arms.ARMS
        call = functools.partial(run, data, order, settings)
        file, setting = f"{name}.jsonl", {"quick": args.quick, "settings": settings}
        found[name] = evidence.runs(
            args.out, learned, args.seeds, call, args.processes, file, setting
        )
    return found


def main():
    parser = evidence.parser(__doc__, "build/branch_lora")
    parser.set_defaults(seeds=SEEDS)
    parser.add_argument("--tune", action="store_true", help="only tune the rates")
    parser.add_argument("--times", action="store_true", help="only measure step times")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    path, size = arms.RATES, (ITEMS, STEPS, None)
    if args.quick:  # also tunes, writing to its own folder
        path, size, args.seeds = args.out / "rates.json", (8, 1, 3), args.seeds[:1]
    if args.tune or args.quick:
        grid, seeds = (arms.GRID[-1:], [100]) if args.quick else (arms.GRID, TUNING_SEEDS)
        tune(args, path, size, grid, seeds)
    if args.tune:
        return
    items, steps, tasks = size
    data = Data("test", items, steps, [] if args.times else args.seeds, tasks)
    times = args.out / "times.json"
    if args.times or not times.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        rounds, count = (2, 4) if args.quick else (15, 32)
        times.write_text(json.dumps(step_times(data, rounds, count)))
    if args.times:
        print(report.times(json.loads(times.read_text())))
        return
    runs = every_run(args, data, arms.settings(path))
    found = data, runs, args.seeds, json.loads(times.read_text())
    text = "**Claims of the abstract.**\n\n" + claims(*found) + "\n\n" + report.markdown(*found)
    text += "\n\n**Tuning**: ACC on the validation items, the first order.\n\n"
    text += evidence.tuning(path) + " " + arms.chosen(path)
    text += "\n\n" + evidence.setting(args.seeds, started)
    text += "\n\n" + "\n".join(f"- {source}" for source in SOURCES) + "\n"
    (args.out / "report.md").write_text(text)
    pictures.draw(args.out, data, runs, args.seeds)
    print(text)
