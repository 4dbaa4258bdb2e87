"""Tables and plot of the conflict dial."""

import statistics

import matplotlib.pyplot as plt
import numpy as np

from examples.c_lorae.learning import ONE
from examples.c_lorae.questions import CONCEPTS, DIAL, QUESTIONS
from examples.common import evidence, figures
from examples.common.evidence import shown, table, verdict

WITHOUT = "C-LoRAE, task experts removed at test"
COLORS = {
    ONE: figures.LOOP,
    "universal only": figures.GREY,
    "one LoRA per task": "#CC79A7",
    "plain sum": "#E69F00",
    "C-LoRAE": figures.OURS,
    "C-LoRAE, negatives within the task": "#56B4E9",
}
LONG = 4  # times the usual steps, for the arms that test whether longer training helps
LAST = DIAL[-1]


def longer(arm):
    return f"{arm}, {LONG} times the steps"


LONGER = {longer(arm): arm for arm in (ONE, "one LoRA per task", "C-LoRAE")}


RATED = tuple(f"{ONE} at {rate}" for rate in ("0.0005", "0.001", "0.002"))  # besides its tuned rate
BEST = f"{ONE}, the best rate at each c"


def key(arm, swapped, times=1):
    return f"{arm} | {swapped} | {times}"


def parted(key):
    """(arm, number of swapped questions, multiple of the usual number of steps) of a key."""
    arm, swapped, times = key.split(" | ")
    return arm, int(swapped), int(times)


def conflict(swapped):
    """The conflict c as text."""
    return f"{swapped}/{LAST}" if 0 < swapped < LAST else str(swapped // LAST)


def right(found, arm, swapped, seeds, times=1):
    """Whether each item is answered correctly, (seeds, items), as 0 and 1."""
    if arm == BEST:  # chosen on these very items, an advantage over the other arms
        each = [right(found, one, swapped, seeds) for one in (ONE, *RATED)]
        return max(each, key=np.mean)
    name, field = ("C-LoRAE", "universal") if arm == WITHOUT else (arm, "right")
    return np.array([found[key(name, swapped, times), s][field] for s in seeds], dtype=float)


def gains(found, arm, seeds, over=ONE):
    """Gain of `arm` over another arm, (points of the dial, seeds, items)."""
    return np.stack([right(found, arm, at, seeds) - right(found, over, at, seeds) for at in DIAL])


def slope(gain):
    """Least-squares slope of the gain over c for each item, (seeds, items)."""
    c = np.array(DIAL) / LAST
    c = c - c.mean()
    return np.tensordot(c / (c**2).sum(), gain, 1)


def markdown(found, arms, seeds):
    parts = [
        "**Accuracy** on held-out words, points; mean over questions, in brackets each seed.",
        accuracies(found, arms, seeds),
        "**Gain over one LoRA**, item by item: mean and 95 % interval over seeds and items; points.",
        differences(found, arms, seeds),
        "**Gain over one LoRA at its best rate for each c**, chosen on the same words.",
        differences(found, arms, seeds, BEST),
        "**Course**: accuracy on the validation words, points, after each fifth of the steps.",
        courses(found, arms, seeds),
        f"**Does more training help?** c = 1 with {LONG} times the steps, each arm at its own rate.",
        long_runs(found, seeds),
        "**Gradients** of one LoRA while it trains.",
        gradients(found, seeds),
    ]
    return "\n\n".join(parts)


def accuracies(found, arms, seeds):
    rows = []
    for arm in [*arms, WITHOUT, *RATED]:
        cells = []
        for at in DIAL:
            each = 100 * right(found, arm, at, seeds).mean(1)
            cells.append(f"{each.mean():.1f} ({', '.join(f'{v:.1f}' for v in each)})")
        size = found[key(arm, 0), seeds[0]]["experts"] if arm != WITHOUT else None
        rows.append([arm, *cells, f"{size:,}" if size else ""])
    return table(["arm", *(f"c = {conflict(at)}" for at in DIAL), "parameters"], rows)


def differences(found, arms, seeds, over=ONE):
    rows = []
    for arm in arms:
        if arm == ONE:
            continue
        gain = gains(found, arm, seeds, over)
        rise = evidence.interval(slope(gain))
        cells = [shown(evidence.interval(each)) for each in gain]
        rows.append([arm, *cells, shown(rise), verdict(rise)])
    head = [*(f"c = {conflict(at)}" for at in DIAL), "rise from c = 0 to 1", "does it rise?"]
    return table(["arm", *head], rows)


def course(found, arm, swapped, seeds):
    """Validation accuracy at each evaluation, (looks,), mean over seeds, in points."""
    return 100 * np.mean([found[key(arm, swapped), s]["curve"] for s in seeds], 0)


def courses(found, arms, seeds):
    rows = []
    for at in (DIAL[0], LAST):
        for arm in arms:
            cells = [f"{v:.1f}" for v in course(found, arm, at, seeds)[1:]]
            rows.append([f"c = {conflict(at)}, {arm}", *cells])
    return table(["arm", *(f"{i}/{len(rows[0]) - 1}" for i in range(1, len(rows[0])))], rows)


def long_runs(found, seeds):
    base, rows = right(found, ONE, LAST, seeds, LONG), []
    for arm in LONGER.values():
        each = right(found, arm, LAST, seeds, LONG)
        single = ", ".join(f"{100 * v:.1f}" for v in each.mean(1))
        gain = "" if arm == ONE else shown(evidence.difference(each, base))
        rows.append([arm, f"{100 * each.mean():.1f} ({single})", gain])
    return table(["arm", "accuracy (each seed)", "gain over one LoRA"], rows)


def gradients(found, seeds):
    """Table of gradient cosines and norm ratios; twins are questions with the same concept."""
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
    """Plots the gain over one LoRA against conflict, and validation accuracy at full conflict."""
    with plt.rc_context(figures.STYLE):
        figure, (left, right_) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
        draw_gains(left, found, arms, seeds)
        draw_course(right_, found, arms, seeds)
        handles, labels = map(
            list.__add__, *(a.get_legend_handles_labels() for a in (right_, left))
        )
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
        figures.save(figure, path)


def draw_gains(axes, found, arms, seeds):
    """Plots the gain over one LoRA at its best rate for each c; dashed: C-LoRAE's at the tuned rate."""
    c = [at / LAST for at in DIAL]
    axes.axhline(0, color=COLORS[ONE], lw=2)
    for arm in (arm for arm in arms if arm in COLORS and arm != ONE):
        intervals = [evidence.interval(each) for each in gains(found, arm, seeds, BEST)]
        mean, low, high = 100 * np.array(intervals).T
        width = 3.2 if arm == "C-LoRAE" else 1.8
        if arm == "C-LoRAE":
            axes.fill_between(c, low, high, color=COLORS[arm], alpha=0.15, lw=0)
        axes.plot(c, mean, "o-", color=COLORS[arm], lw=width, ms=width + 2)
    tuned = 100 * gains(found, "C-LoRAE", seeds).mean((1, 2))
    label = "C-LoRAE, over one LoRA at its tuned rate"
    axes.plot(c, tuned, "--", color=COLORS["C-LoRAE"], lw=1.4, label=label)
    axes.set_xticks(c, [f"{conflict(at)}" for at in DIAL])
    axes.set(
        xlabel="conflict c: share of questions whose twin swaps yes and no", ylabel="gain, points"
    )
    axes.set_title("Gain over one LoRA at its best rate for each c", size=12)


def draw_course(axes, found, arms, seeds):
    for arm in (arm for arm in arms if arm in COLORS):
        values = course(found, arm, LAST, seeds)
        at = np.linspace(0, 100, len(values))
        width = 3.2 if arm in ("C-LoRAE", ONE) else 1.8
        axes.plot(at, values, "o-", color=COLORS[arm], lw=width, ms=width + 2, label=arm)
    axes.set(xlabel="steps, % of the run", ylabel="validation accuracy, %")
    axes.set_title("Training where all twins disagree (c = 1)", size=12)
