"""What examples/c_lorae/experiment.py writes: tables of scores and of paired differences, two pictures."""

from collections import Counter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from examples.c_lorae import data as kaomoji_sets
from examples.common.evidence import difference, shown, table, verdict
from examples.common.figures import GREY, INK, LOOP, OURS, STYLE

TASKS = tuple(kaomoji_sets.LABELS)
SMALL = "intent"
EQUAL, ACHIEVING = "C-LoRAE, equal weights", "C-LoRAE"
QUESTIONS = (  # what is asked, the two arms, on which tasks
    ("C-LoRAE > one LoRA", EQUAL, "one LoRA", TASKS),
    ("C-LoRAE > universal only", EQUAL, "universal only", TASKS),
    ("C-LoRAE > plain sum", EQUAL, "plain sum", TASKS),
    ("one LoRA > universal only", "one LoRA", "universal only", TASKS),
    (f"achievement > equal weights, {SMALL} (small)", ACHIEVING, EQUAL, (SMALL,)),
    ("achievement > equal weights, all", ACHIEVING, EQUAL, TASKS),
    ("C-LoRAE with achievement > one LoRA", ACHIEVING, "one LoRA", TASKS),
    ("C-LoRAE > one LoRA, active size", EQUAL, "one LoRA, active size", TASKS),
    ("C-LoRAE, one scale > C-LoRAE", "C-LoRAE, one scale", EQUAL, TASKS),
    ("C-LoRAE, one scale > one LoRA", "C-LoRAE, one scale", "one LoRA", TASKS),
)


def markdown(study, arms, seeds, found, potentials):
    parts = [
        "Set F1 of held-out items in points, mean over seeds, in brackets each seed.",
        scores(study, arms, seeds, found),
        near(study),
        "Paired differences in points, 95 % intervals over items and seeds.",
        differences(seeds, found),
        "What carries it: set F1 on the validation items (mean of tasks and seeds), and the training loss "
        "of the last 20 steps.",
        ablations(arms, seeds, found),
        "The achievement loss: potentials of the tasks, weights in the course of training (mean of seeds).",
        achievement(seeds, found, potentials),
    ]
    return "\n\n".join(parts)


def scores(study, arms, seeds, found):
    sizes = [len(task.heldout) for task in study.tasks]
    head = ["arm", "parameters of the experts", "CPU seconds of training"]
    head += [f"{t} (n = {n})" for t, n in zip(TASKS, sizes)] + ["mean"]
    constant = [100 * majority(task) for task in study.tasks]
    rows = [
        ["the commonest set", "", "", *(f"{f:.1f}" for f in constant), f"{np.mean(constant):.1f}"]
    ]
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds]
        each = np.array(
            [[100 * np.mean(r["heldout"][t]) for t in TASKS] for r in runs]
        )  # (seeds, 3)
        each = np.column_stack([each, each.mean(1)])
        cells = [f"{c.mean():.1f} ({', '.join(f'{v:.1f}' for v in c)})" for c in each.T]
        seconds = np.mean([r["cpu"] for r in runs])
        rows.append([arm, f"{runs[0]['experts']:,}", f"{seconds:.0f}", *cells])
    return table(head, rows)


def near(study):
    """How close the held-out drawings are to the training ones, of whatever task."""
    trained = [item for task in study.tasks for item in task.train]
    shares = [
        f"{kaomoji_sets.nearly_equal(t.heldout, trained):.1%} ({n})"
        for n, t in zip(TASKS, study.tasks)
    ]
    return (
        "Held-out drawings one character away from a training drawing: " + ", ".join(shares) + "."
    )


def majority(task):
    """Set F1 of one and the same answer, the commonest set of the training items."""
    best = Counter(item.wanted for item in task.train).most_common(1)[0][0]
    same = [2 * len(best & i.wanted) / (len(best) + len(i.wanted)) for i in task.heldout]
    return float(np.mean(same))


def differences(seeds, found):
    rows = []
    for question, first, second, tasks in QUESTIONS:
        pair = [
            [np.concatenate([found[arm, s]["heldout"][t] for t in tasks]) for s in seeds]
            for arm in (first, second)
        ]
        gap = difference(*pair)
        each = ", ".join(f"{100 * (np.mean(a) - np.mean(b)):+.1f}" for a, b in zip(*pair))
        rows.append([question, shown(gap), each, verdict(gap)])
    return table(["claim", "difference", "each seed", "shown"], rows)


def ablations(arms, seeds, found):
    kinds = ("validation", "without pictures", "without task experts", "another task's expert")
    rows = []
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds]
        cells = [
            f"{np.mean([100 * np.mean(list(r[k].values())) for r in runs]):.1f}"
            if k in runs[0]
            else ""
            for k in kinds
        ]
        losses = [f"{np.mean([r['loss'][t] for r in runs]):.2f}" for t in TASKS]
        rows.append([arm, *cells, " / ".join(losses)])
    return table(["arm", "as trained", *kinds[1:], "loss " + " / ".join(TASKS)], rows)


def achievement(seeds, found, potentials):
    mean = np.mean([[potentials[seed][t] for t in TASKS] for seed in seeds], 0)
    weights = np.mean([found[ACHIEVING, seed]["weights"] for seed in seeds], 0)  # (evaluations, 3)
    rows = [["potential, set F1 alone", *(f"{100 * p:.1f}" for p in mean)]]
    rows += [[f"weights {i + 1}", *(f"{w:.3f}" for w in row)] for i, row in enumerate(weights)]
    return table(["", *TASKS], rows)


def draw(out, study, arms, seeds, found):
    draw_scores(out / "scores.png", arms, seeds, found)
    draw_items(out / "kaomoji.png", study)


def draw_scores(path, arms, seeds, found):
    colours = dict(zip(arms, (GREY, INK, LOOP, "#56B4E9", OURS, GREY, "#009E73")))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
        for axes, task in zip(panels, TASKS):
            for y, arm in enumerate(reversed(list(arms))):
                values = [np.mean(found[arm, seed]["heldout"][task]) for seed in seeds]
                axes.plot(values, [y] * len(values), "o", ms=6, alpha=0.55, color=colours[arm])
                axes.plot(np.mean(values), y, "|", ms=20, mew=2.5, color=colours[arm])
            axes.set_title(f"{task}, a tenth" if task == SMALL else task, size=11, pad=8)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.grid(axis="x", color="#F1F3F4")
        panels[0].set(
            yticks=range(len(arms)), yticklabels=list(arms)[::-1], ylim=(-0.6, len(arms) - 0.4)
        )
        figure.supxlabel(
            "set F1 of held-out items: each seed, and their mean", size=10, color="#5F6368"
        )
        figure.savefig(path)
        plt.close(figure)


def draw_items(path, study):
    """Two held-out items of each task as the model sees them, with what is asked."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(3, 2, figsize=(9, 2.6), layout="constrained")
        for name, task, row in zip(TASKS, study.tasks, panels):
            chosen = [item for item in task.heldout if item.text and len(item.wanted) > 1][:2]
            for axes, item in zip(row, chosen):
                cells = kaomoji_sets.cells(item.drawing)[: len(item.drawing)]
                side = kaomoji_sets.CELL
                axes.imshow(np.concatenate(cells.reshape(-1, side, side), 1), cmap="gray_r")
                axes.set(xticks=[], yticks=[], xlim=(0, kaomoji_sets.CELLS * side))
                axes.spines[:].set_visible(False)
                axes.set_title(
                    f'"{item.text}"  {name}: {item.answer}', size=9, weight="normal", pad=3
                )
        figure.savefig(path)
        plt.close(figure)
