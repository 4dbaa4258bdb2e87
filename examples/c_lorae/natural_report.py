"""Tables and plot of the seven tasks trained together."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from examples.c_lorae.learning import ONE, by_task
from examples.common import evidence, figures
from examples.common.evidence import shown, table, verdict

OURS, WITHOUT = "C-LoRAE", "C-LoRAE, task experts removed at test"
CLAIMS = (  # (first, second, what it says that the first is better)
    (OURS, ONE, "C-LoRAE beats one LoRA of the same size"),
    (OURS, "universal only", "task experts help the universal one"),
    (OURS, "one LoRA per task", "a universal expert helps the task experts"),
    (OURS, "plain sum", "the gate beats the plain sum"),
    (OURS, "C-LoRAE without mutual information", "the mutual information helps"),
    ("C-LoRAE, negatives within the task", OURS, "negatives within the task are better"),
    (ONE, "universal only", "more rank helps one LoRA"),
    ("universal only", WITHOUT, "a universal expert alone is better trained alone"),
)


def right(found, arm, seeds):
    """Whether each item is answered correctly, (seeds, items), as 0 and 1."""
    name, field = (OURS, "universal") if arm == WITHOUT else (arm, "right")
    return np.array([found[name, seed][field] for seed in seeds], dtype=float)


def weighted(values, tasks):
    """values (seeds, items), scaled so that their mean over items is the mean of the tasks' means."""
    counts = np.bincount(tasks)[tasks]
    return values * len(tasks) / (counts * len(np.unique(tasks)))


def markdown(study, found, seeds):
    parts = [
        described(study),
        "**Accuracy** on held-out items and instructions, points; in brackets each seed's mean.",
        accuracies(study, found, seeds),
        "**Differences**, item by item, with tasks weighted equally: 95 % intervals; points.",
        differences(study, found, seeds),
    ]
    return "\n\n".join(parts)


def described(study):
    sizes = np.bincount(study.train.tasks).tolist()
    each = ", ".join(f"{task.name} {size:,}" for task, size in zip(study.tasks, sizes))
    return f"Training items: {each}; {len(study.test)} held-out items in all."


def accuracies(study, found, seeds):
    tasks = study.test.tasks
    rows = []
    for arm in [*study.arms, WITHOUT]:
        each = np.array([by_task(hits, tasks) for hits in right(found, arm, seeds)])  # (seeds, N)
        cells = [f"{100 * v:.1f}" for v in each.mean(0)]
        single = ", ".join(f"{100 * v:.1f}" for v in each.mean(1))
        size = f"{found[arm, seeds[0]]['experts']:,}" if arm != WITHOUT else ""
        rows.append([arm, *cells, f"{100 * each.mean():.1f} ({single})", size])
    majority = [
        float(np.bincount(study.test.wanted[tasks == t]).max() / (tasks == t).sum())
        for t in range(len(study.tasks))
    ]
    rows.append(
        ["majority", *(f"{100 * v:.1f}" for v in majority), f"{100 * np.mean(majority):.1f}", ""]
    )
    return table(["arm", *(task.name for task in study.tasks), "mean", "parameters"], rows)


def differences(study, found, seeds):
    tasks = study.test.tasks.numpy()
    rows = []
    for first, second, claim in CLAIMS:
        pair = [weighted(right(found, arm, seeds), tasks) for arm in (first, second)]
        each = 100 * (pair[0] - pair[1]).mean(1)
        interval = evidence.difference(*pair)
        cells = [shown(interval), ", ".join(f"{v:+.1f}" for v in each), verdict(interval)]
        rows.append([claim, f"{first} minus {second}", *cells])
    return table(["claim", "difference", "points", "each seed", "shown"], rows)


def draw(path, study, found, seeds):
    """Plots accuracy per task for one LoRA, C-LoRAE and one LoRA per task."""
    arms = {ONE: figures.GREY, "one LoRA per task": "#CC79A7", OURS: figures.OURS}
    tasks = study.test.tasks
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
        at = np.arange(len(study.tasks))
        for shift, (arm, color) in zip((-0.26, 0, 0.26), arms.items()):
            each = np.array([by_task(hits, tasks) for hits in right(found, arm, seeds)])
            axes.bar(at + shift, each.mean(0), 0.24, color=color, label=arm)
            axes.plot(np.tile(at + shift, (len(seeds), 1)), each, ".", color=figures.INK, ms=3)
        axes.set_xticks(at, [task.name for task in study.tasks])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(ylabel="held-out accuracy; dots: seeds")
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_title("Seven tasks trained together", pad=34)
        figures.save(figure, path)
