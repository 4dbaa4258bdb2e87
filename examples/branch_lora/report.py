"""Tables of BranchLoRA's example from the finished runs, {order: {(arm, seed): run}}."""

import statistics
from itertools import pairwise

import numpy as np

from examples.branch_lora.arms import ABLATIONS, ARMS, LADDER, MAIN
from examples.branch_lora.tasks import orders
from examples.common import evidence
from examples.common.evidence import shown, table, verdict

METRICS = ("ACC", "MAA", "BWT")
NAMES = {
    "lora": "sequential LoRA",
    "EWC": "EWC",
    "LwF": "LwF",
    "LoRA per task": "LoRA per task",
    "moelora": "MoELoRA",
    "shared A": "+ shared A",
    "sparse": "+ sparse, by sequence",
    "freezing": "+ freezing",
    "BranchLoRA": "BranchLoRA",
    "no freezing": "BranchLoRA without freezing",
    "trunk held": "BranchLoRA, A held after task 1",
    "growing": "BranchLoRA, growing",
    "joint": "joint training (upper bound)",
}


def by_item(right, order):
    """{metric: (items,)} with means ACC, MAA and BWT; items are in the given order of tasks.

    The last task cannot be forgotten: its items are 0 in BWT, and the others are scaled by n / (n - 1).
    Joint training has no order of tasks, so it has only ACC.
    """
    n = len(order)
    rows = [[np.asarray(row, dtype=float) for row in rows] for rows in right]
    values = {"ACC": rows[-1]}
    if len(rows) == n:
        values["MAA"] = [sum(rows[i][j] / (i + 1) for i in range(j, n)) for j in range(n)]
        values["BWT"] = [(rows[-1][j] - rows[j][j]) * n / max(n - 1, 1) for j in range(n)]
    given = [order.index(t) for t in range(n)]
    return {metric: np.concatenate([of[j] for j in given]) for metric, of in values.items()}


class Found:
    """Access to the runs for tables and plots."""

    def __init__(self, data, runs, seeds):
        self.data, self.seeds, self.orders = data, seeds, orders(data.tasks)
        joint = {("joint", seed): next(iter(runs.values()))["joint", seed] for seed in seeds}
        self.runs = {order: of | joint for order, of in runs.items()}  # joint training has no order

    def of(self, arm):
        """[(order, run)] for each order and seed."""
        return [(o, self.runs[o][arm, seed]) for o in self.orders for seed in self.seeds]

    def items(self, arm, metric):
        """The metric item by item, (orders, seeds, items)."""
        each = [by_item(run["right"], self.orders[order])[metric] for order, run in self.of(arm)]
        return np.stack(each).reshape(len(self.orders), len(self.seeds), -1)

    def metrics(self, arm):
        return METRICS[:1] if arm == "joint" else METRICS

    def tasks(self, arm, read):
        """(orders, seeds, tasks, items) of read(run), which is (tasks, items) in the order of learning."""
        given = range(len(self.data.tasks))
        each = [[read(run)[self.orders[o].index(t)] for t in given] for o, run in self.of(arm)]
        return np.asarray(each, float).reshape(
            len(self.orders), len(self.seeds), len(self.data.tasks), -1
        )


def markdown(data, runs, seeds, seconds):
    found = Found(data, runs, seeds)
    parts = [
        "**After all tasks**, mean over orders and seeds (each order in turn); points.",
        metrics(found),
        "\n".join(
            f"- {name}: {', '.join(data.tasks[t].name for t in order)}"
            for name, order in found.orders.items()
        ),
        "**BranchLoRA and the main arms**, item by item: mean and 95 % interval; points.",
        differences(found, [("BranchLoRA", arm) for arm in (*MAIN[:-1], "joint")]),
        "**The ladder**, each rung minus the one before (BranchLoRA adds task routers); points.",
        differences(found, [(b, a) for a, b in pairwise(LADDER)]),
        "**Ablations**, minus BranchLoRA; points.",
        differences(found, [(arm, "BranchLoRA") for arm in ABLATIONS]),
        "**Each task** as it was learned → after the last, mean over orders and seeds; points.",
        by_task(found),
        "**Who knows the task**, after the last task; mean over orders and seeds, 95 % interval.",
        selection(found),
        "**A training step**, first task; median and quartiles of turns on the same batch.",
        times(seconds),
    ]
    return "\n\n".join(parts)


def metrics(found):
    rows = []
    for arm in ARMS:
        cells = dict.fromkeys(METRICS, "")
        for metric in found.metrics(arm):
            each = [f"{100 * mean:.1f}" for mean in found.items(arm, metric).mean((1, 2))]
            mean = f"{100 * found.items(arm, metric).mean():.1f}"
            cells[metric] = mean if arm == "joint" else f"{mean} ({', '.join(each)})"
        rows.append([NAMES[arm], *cells.values(), f"{found.of(arm)[0][1]['trained'][0]:,}"])
    return table(["arm", *METRICS, "trained at once"], rows)


def differences(found, pairs):
    rows = []
    for first, second in pairs:
        cells = dict.fromkeys(METRICS, "")
        for metric in found.metrics(second):
            pair = (found.items(arm, metric) for arm in (first, second))
            difference = evidence.difference(*pair)
            cells[metric] = f"{shown(difference)} {verdict(difference)}"
        rows.append([f"{NAMES[first]} minus {NAMES[second]}", *cells.values()])
    return table(["difference; is it above 0?", *METRICS], rows)


def by_task(found):
    tasks, rows = found.data.tasks, []
    for arm in ARMS:
        last = found.tasks(arm, lambda run: run["right"][-1]).mean((0, 1, 3))
        cells = [f"{100 * v:.0f}" for v in last]
        if arm != "joint":
            learned = found.tasks(arm, lambda run: [row[-1] for row in run["right"]])
            cells = [f"{100 * v:.0f} → {c}" for v, c in zip(learned.mean((0, 1, 3)), cells)]
        rows.append([NAMES[arm], *cells])
    data = found.data
    majority = [f"{100 * task.majority(data.split, data.items):.0f}" for task in tasks]
    return table(["arm", *(task.name for task in tasks)], [*rows, ["majority", *majority]])


def selection(found):
    def row(name, arm, read):
        values = found.tasks(arm, read)
        cells = [f"{100 * v:.1f}" for v in values.mean((0, 1, 3))]
        flat = values.reshape(*values.shape[:2], -1)
        mean, low, high = (100 * v for v in evidence.interval(flat))
        return [name, *cells, f"{mean:.1f} [{low:.1f}, {high:.1f}]"]

    rows = [
        row("selector is right, %", "BranchLoRA", lambda run: run["selected"]),
        row("BranchLoRA is right, %", "BranchLoRA", lambda run: run["right"][-1]),
        row("... had the selector been right, %", "BranchLoRA", lambda run: run["oracle"]),
        row("LoRA per task is right, %", "LoRA per task", lambda run: run["right"][-1]),
        row("... had the selector been right, %", "LoRA per task", lambda run: run["oracle"]),
    ]
    frozen = statistics.mean(n for _, run in found.of("BranchLoRA") for n in run["frozen"])
    text = table(["", *(task.name for task in found.data.tasks), "all"], rows)
    return f"{text}\n\nFrozen branches a layer at the end: {frozen:.1f}."


def times(seconds):
    rows = []
    for name, values in seconds.items():
        low, middle, high = (1000 * v for v in np.quantile(values, (0.25, 0.5, 0.75)))
        ratio = statistics.median(a / b for a, b in zip(values, seconds["moelora"]))
        rows.append([name, f"{middle:.0f} [{low:.0f}, {high:.0f}]", f"{ratio:.2f}"])
    return table(["arm", "ms a step", "of MoELoRA's"], rows)
