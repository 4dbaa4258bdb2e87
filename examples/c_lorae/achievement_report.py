"""Tables and plot for the losses that weight tasks."""

import matplotlib.pyplot as plt
import numpy as np

from examples.c_lorae.learning import by_task
from examples.c_lorae.natural_report import weighted
from examples.common import evidence, figures
from examples.common.evidence import shown, table, verdict

BASE, SMALL = "mean over items", 2  # number of smallest tasks that are shown separately
CLAIMS = (  # (first, second, what it says that the first is better)
    ("mean over tasks", BASE, "equal tasks beat equal items"),
    ("geometric mean", "mean over tasks", "the geometric mean alone helps"),
    ("achievement, geometric", "geometric mean", "achievement weights help the geometric mean"),
    ("achievement, sum", "mean over tasks", "achievement weights help the sum"),
    ("achievement, weights / sum", "mean over tasks", "weights that reach 0 help"),
    ("achievement, geometric", BASE, "the published loss beats the mean over items"),
)


def right(found, arm, seeds):
    """Whether each item is answered correctly, (seeds, items), as 0 and 1."""
    return np.array([found[arm, seed]["right"] for seed in seeds], dtype=float)


def markdown(study, found, potentials, seeds):
    parts = [
        "**Accuracy** on held-out items and instructions, points; in brackets each seed's mean.",
        accuracies(study, found, potentials, seeds),
        "**Differences**, item by item, with tasks weighted equally: 95 % intervals; points.",
        differences(study, found, seeds),
        "**Weights**: mean over seeds at the first, the middle and the last update.",
        weights(study, found, seeds),
    ]
    return "\n\n".join(parts)


def arms_of(found):
    return list(dict.fromkeys(arm for arm, _ in found))


def smallest(study):
    """Indices of the smallest tasks."""
    return np.argsort(np.bincount(study.train.tasks))[:SMALL]


def accuracies(study, found, potentials, seeds):
    tasks = study.test.tasks
    rows = []
    for arm in arms_of(found):
        each = np.array([by_task(hits, tasks) for hits in right(found, arm, seeds)])  # (seeds, N)
        cells = [f"{100 * v:.1f}" for v in each.mean(0)]
        single = ", ".join(f"{100 * v:.1f}" for v in each.mean(1))
        rows.append([arm, *cells, f"{100 * each.mean():.1f} ({single})"])
    goals = [100 * potentials[task.name] for task in study.tasks]
    potential = ["potential (validation)", *(f"{v:.1f}" for v in goals), f"{np.mean(goals):.1f}"]
    return table(["arm", *(task.name for task in study.tasks), "mean"], [*rows, potential])


def differences(study, found, seeds):
    tasks = study.test.tasks.numpy()
    small = np.isin(tasks, smallest(study))
    rows = []
    for first, second, claim in CLAIMS:
        cells = []
        for chosen in (slice(None), small):
            pair = [
                weighted(right(found, a, seeds)[:, chosen], tasks[chosen]) for a in (first, second)
            ]
            interval = evidence.difference(*pair)
            cells.append(f"{shown(interval)} {verdict(interval)}")
        rows.append([claim, f"{first} minus {second}", *cells])
    names = " and ".join(study.tasks[t].name for t in sorted(smallest(study)))
    return table(["claim", "difference", "all tasks", f"the smallest: {names}"], rows)


def course(found, arm, seeds):
    """The tasks' weights at each update, (updates, N), mean over seeds."""
    return np.mean([found[arm, seed]["weights"] for seed in seeds], 0)


def weights(study, found, seeds):
    rows = []
    for arm in (arm for arm in arms_of(found) if found[arm, seeds[0]]["weights"]):
        values = course(found, arm, seeds)
        for name, at in (("first", 0), ("middle", len(values) // 2), ("last", -1)):
            rows.append([f"{arm}, {name}", *(f"{v:.3f}" for v in values[at])])
    return table(["", *(task.name for task in study.tasks)], rows)


def draw(path, study, found, seeds):
    """Plots the weights over training."""
    arms = [arm for arm in arms_of(found) if found[arm, seeds[0]]["weights"]]
    with plt.rc_context(figures.STYLE):
        figure, panels = plt.subplots(
            1, len(arms), figsize=(10, 4), sharey=True, layout="constrained"
        )
        for axes, arm in zip(panels, arms):
            for values, task in zip(course(found, arm, seeds).T, study.tasks):
                axes.plot(range(1, len(values) + 1), values, lw=1.8, label=task.name)
            axes.axhline(1 / len(study.tasks), color=figures.INK, lw=1, ls=":")
            axes.set_title(arm, size=11, pad=8)
            axes.set(xlabel="update")
        panels[0].set(ylabel="weight of the task", ylim=(0, None))
        panels[-1].legend(frameon=False, fontsize=8)
        figure.suptitle("Weight of each task", x=0.01, ha="left", weight="bold", size=13)
        figures.save(figure, path)
