"""The conflict dial's tables and picture."""

import statistics

import matplotlib.pyplot as plt
import numpy as np

from examples.c_lorae.learning import ONE
from examples.c_lorae.questions import CONCEPTS, DIAL, QUESTIONS
from examples.common import evidence, figures
from examples.common.evidence import shown, table, verdict

WITHOUT = "C-LoRAE, task experts removed at test"
COLORS = {
    "universal only": figures.GREY,
    "one LoRA per task": "#CC79A7",
    "plain sum": "#E69F00",
    "C-LoRAE": figures.OURS,
    "C-LoRAE, negatives within the task": "#56B4E9",
}
LONG = 4  # times as many steps, for the arms that say whether time heals
LAST = DIAL[-1]


def longer(arm):
    return f"{arm}, {LONG} times the steps"


LONGER = {longer(arm): arm for arm in (ONE, "one LoRA per task", "C-LoRAE")}


def key(arm, swapped, times=1):
    return f"{arm} | {swapped} | {times}"


def parted(key):
    """arm, swapped questions, times the usual number of steps"""
    arm, swapped, times = key.split(" | ")
    return arm, int(swapped), int(times)


def conflict(swapped):
    """c, as text."""
    return f"{swapped}/{LAST}" if 0 < swapped < LAST else str(swapped // LAST)


def right(found, arm, swapped, seeds, times=1):
    """(seeds, items)"""
    name, field = ("C-LoRAE", "universal") if arm == WITHOUT else (arm, "right")
    return np.array([found[key(name, swapped, times), s][field] for s in seeds], dtype=float)


def gains(found, arm, seeds):
    """Over one LoRA, (points of the dial, seeds, items)."""
    return np.stack([right(found, arm, at, seeds) - right(found, ONE, at, seeds) for at in DIAL])


def slope(gain):
    """Least squares of the gain over c, item by item: (seeds, items)."""
    c = np.array(DIAL) / LAST
    c = c - c.mean()
    return np.tensordot(c / (c**2).sum(), gain, 1)


def markdown(found, arms, seeds):
    parts = [
        "**Accuracy** on held-out words, points; mean over questions, in brackets each seed.",
        accuracies(found, arms, seeds),
        "**Gain over one LoRA**, item by item: mean and 95 % interval over seeds and items; points.",
        differences(found, arms, seeds),
        "**Gradients** of one LoRA while it trains: of the questions with and without a swapped twin.",
        gradients(found, seeds),
    ]
    return "\n\n".join(parts)


def accuracies(found, arms, seeds):
    rows = []
    for arm in [*arms, WITHOUT]:
        cells = []
        for at in DIAL:
            each = 100 * right(found, arm, at, seeds).mean(1)
            cells.append(f"{each.mean():.1f} ({', '.join(f'{v:.1f}' for v in each)})")
        size = found[key(arm, 0), seeds[0]]["experts"] if arm != WITHOUT else None
        rows.append([arm, *cells, f"{size:,}" if size else ""])
    return table(["arm", *(f"c = {conflict(at)}" for at in DIAL), "parameters"], rows)


def differences(found, arms, seeds):
    rows = []
    for arm in arms:
        if arm == ONE:
            continue
        gain = gains(found, arm, seeds)
        rise = evidence.interval(slope(gain))
        cells = [shown(evidence.interval(each)) for each in gain]
        rows.append([arm, *cells, shown(rise), verdict(rise)])
    head = [*(f"c = {conflict(at)}" for at in DIAL), "rise from c = 0 to 1", "does it rise?"]
    return table(["arm", *head], rows)


def gradients(found, seeds):
    """Cosines of twins (the same words, equal or opposite answers) and of the others; norm ratios."""
    pairs = [(i, j) for i in range(QUESTIONS) for j in range(i + 1, QUESTIONS)]
    twins = np.array([j - i == len(CONCEPTS) for i, j in pairs])
    rows = []
    for at in DIAL:
        looks = [look for s in seeds for look in found[key(ONE, at), s]["gradients"]]
        cosines = np.array([look["cosines"] for look in looks])
        ratio = statistics.mean(look["norm ratio"] for look in looks)
        below = (cosines < 0).mean()
        cells = [f"{cosines[:, twins].mean():+.2f}", f"{cosines[:, ~twins].mean():+.2f}"]
        rows.append([f"c = {conflict(at)}", *cells, f"{below:.0%}", f"{ratio:.1f}"])
    head = ["cosine of twins", "of other pairs", "pairs below zero", "largest norm / smallest"]
    return table(["", *head], rows)


def draw(path, found, arms, seeds):
    """Gain over one LoRA against conflict."""
    c = [at / LAST for at in DIAL]
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        axes.axhline(0, color=figures.INK, lw=1)
        axes.text(0.01, 0.3, "one LoRA of the same size", color=figures.INK, fontsize=9)
        for arm in (arm for arm in arms if arm in COLORS):
            found_gains = [evidence.interval(each) for each in gains(found, arm, seeds)]
            mean, low, high = 100 * np.array(found_gains).T
            width = 3.2 if arm == "C-LoRAE" else 1.8
            axes.fill_between(c, low, high, color=COLORS[arm], alpha=0.12, lw=0)
            axes.plot(c, mean, "o-", color=COLORS[arm], lw=width, ms=width + 2, label=arm)
        axes.set_xticks(c, [f"{conflict(at)}" for at in DIAL])
        axes.set(
            xlabel="conflict: share of the second half of the tasks that swap yes and no",
            ylabel="points of accuracy above one LoRA",
        )
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_title("What a mixture gains where tasks disagree", pad=56)
        figures.save(figure, path)
