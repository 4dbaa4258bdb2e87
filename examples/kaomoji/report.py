"""Report of the kaomoji experiment: tables of scores and of paired differences, and a plot."""

from collections import Counter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from examples.common import evidence
from examples.common.figures import STYLE, save
from examples.kaomoji import data, pictures
from examples.kaomoji.arms import ARMS, TASKS

CLAIMS = (  # first > second
    ("C-LoRAE", "one LoRA"),
    ("C-LoRAE", "one LoRA per task"),
    ("C-LoRAE", "universal only"),
    ("C-LoRAE", "plain sum"),
    ("one LoRA", "universal only"),
)
ASKED = ("validation", "without pictures", "without task experts", "another task's expert")


def write(out, study, seeds, found, rates, started):
    """OUT/report.md and OUT/kaomoji.png; prints the report."""
    parts = [
        "Set F1 of held-out items in points, mean over seeds (each seed in parentheses).",
        scores(study, seeds, found),
        near(study),
        "Paired differences in points, 95 % intervals over items and seeds.",
        differences(seeds, found),
        "Ablations: set F1 on the validation items, mean over tasks and seeds, and the training loss of the"
        " last 50 steps.",
        ablations(seeds, found),
        "How each arm's rate was chosen: mean set F1 on the validation items, in points.",
        evidence.tuning(rates),
        evidence.setting(seeds, started)
        + f" Computed in {str(study.upper.dtype).removeprefix('torch.')}.",
        data.SOURCE,
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "report.md").write_text(text)
    draw_items(out / "kaomoji.png", study)
    print(text)


def scores(study, seeds, found):
    sizes = [len(task.heldout) for task in study.tasks]
    head = ["arm", "rate", "parameters of the experts", "CPU seconds of training"]
    head += [f"{t} (n = {n})" for t, n in zip(TASKS, sizes)] + ["mean"]
    constant = [100 * majority(task) for task in study.tasks]
    constant = [f"{f:.1f}" for f in (*constant, np.mean(constant))]
    rows = [["most common set", "", "", "", *constant]]
    for arm in ARMS:
        runs = [found[arm, seed] for seed in seeds]
        each = 100 * np.array([[np.mean(r["heldout"][t]) for t in TASKS] for r in runs])
        each = np.column_stack([each, each.mean(1)])  # (seeds, tasks and their mean)
        cells = [f"{c.mean():.1f} ({', '.join(f'{v:.1f}' for v in c)})" for c in each.T]
        seconds = np.mean([r["cpu"] for r in runs])
        first = [f"{runs[0]['rate']:g}", f"{runs[0]['experts']:,}", f"{seconds:.0f}"]
        rows.append([arm, *first, *cells])
    return evidence.table(head, rows)


def near(study):
    """A sentence on how close the held-out drawings are to the training drawings of all tasks."""
    trained = [item for task in study.tasks for item in task.train]
    shares = [data.nearly_equal(task.heldout, trained) for task in study.tasks]
    listed = ", ".join(f"{share:.1%} ({name})" for name, share in zip(TASKS, shares))
    return f"Held-out drawings one character away from a training drawing: {listed}."


def majority(task):
    """Set F1 of always answering with the most common set of the training items."""
    best = Counter(item.wanted for item in task.train).most_common(1)[0][0]
    same = [2 * len(best & i.wanted) / (len(best) + len(i.wanted)) for i in task.heldout]
    return float(np.mean(same))


def differences(seeds, found):
    rows = []
    for claim in CLAIMS:
        pair = [
            [np.concatenate([found[arm, s]["heldout"][t] for t in TASKS]) for s in seeds]
            for arm in claim
        ]
        gap = evidence.difference(*pair)
        each = ", ".join(f"{100 * (np.mean(a) - np.mean(b)):+.1f}" for a, b in zip(*pair))
        rows.append([" > ".join(claim), evidence.shown(gap), each, evidence.verdict(gap)])
    return evidence.table(["claim", "difference", "each seed", "shown"], rows)


def ablations(seeds, found):
    rows = []
    for arm in ARMS:
        runs = [found[arm, seed] for seed in seeds]
        cells = [
            f"{100 * np.mean([r[how] for r in runs]):.1f}" if how in runs[0] else ""
            for how in ASKED
        ]
        losses = [f"{np.mean([r['loss'][t] for r in runs]):.2f}" for t in TASKS]
        rows.append([arm, *cells, " / ".join(losses)])
    return evidence.table(["arm", "as trained", *ASKED[1:], "loss " + " / ".join(TASKS)], rows)


def draw_items(path, study):
    """Draws two held-out items of each task as the model sees them, with their prompts."""
    side = pictures.CELL
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(3, 2, figsize=(9, 2.6), layout="constrained")
        for name, task, row in zip(TASKS, study.tasks, panels):
            chosen = [item for item in task.heldout if item.text and len(item.wanted) > 1][:2]
            for axes, item in zip(row, chosen):
                cells = pictures.cells(item.drawing)[: len(item.drawing)]
                axes.imshow(np.concatenate(cells.reshape(-1, side, side), 1), cmap="gray_r")
                axes.set(xticks=[], yticks=[], xlim=(0, pictures.CELLS * side))
                axes.spines[:].set_visible(False)
                title = f'"{item.text}"  {name}: {item.answer}'
                axes.set_title(title, size=9, weight="normal", pad=3)
        return save(figure, path)
