"""The two pictures of docs/mmolre.md."""

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen

import matplotlib.pyplot as plt
import numpy as np

from examples.common.figures import GREY, INK, OURS, STYLE, WHITE_TO_BLUE
from examples.mmolre.comparisons import FIRST


def draw_differences(path, rows):
    """What MMoLRE is better by, with intervals."""
    titles = ("sentiment: MAE saved", "emotion: points of weighted F1")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for axes, title, which, scale in zip(panels, titles, (2, 3), (1, 100)):
            axes.axvline(0, color=INK, lw=1)
            for y, row in enumerate(reversed(rows)):
                mean, low, high = (scale * v for v in row[which])
                colour = OURS if low > 0 else GREY
                axes.plot(
                    [low, high], [y, y], color=colour, lw=5, alpha=0.5, solid_capstyle="round"
                )
                axes.plot(mean, y, "o", color=colour, ms=8)
            axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
            axes.set_title(title, size=11)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(plt.MaxNLocator(5))
            axes.margins(y=0.15)
        figure.suptitle(
            f"What {FIRST} is better by, 95 % intervals", x=0.01, ha="left", weight="bold"
        )
        figure.savefig(path)
        plt.close(figure)


def draw_gates(path, seeds):
    """Mean gate of each expert by modality, block and task; the first seed, since experts have no names."""
    shares, tasks = seeds[0], ("sentiment", "emotion")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(shares), 2, figsize=(8, 1.7 * len(shares) + 0.8), layout="constrained"
        )
        for row, (modality, blocks) in zip(panels, shares.items()):
            for number, (axes, gates) in enumerate(zip(row, blocks)):
                gates = np.array(gates)  # (tasks, E)
                image = axes.imshow(gates, cmap=WHITE_TO_BLUE, vmin=0, vmax=0.6, aspect="auto")
                shared = gates.shape[1] - len(tasks)
                names = [*map(str, range(1, shared + 1)), *("own" for _ in tasks)]
                axes.set_xticks(range(len(names)), names)
                axes.set_yticks(range(len(tasks)), tasks if number == 0 else [])
                axes.set_title(f"{modality}, block {number + 1}", size=11, pad=6)
                axes.spines[:].set_visible(False)
                for (y, x), value in np.ndenumerate(gates):
                    if value:
                        axes.text(
                            x, y, f"{value:.0%}", ha="center", va="center", size=9,
                            color="white" if value > 0.3 else INK,
                        )  # fmt: skip
        figure.colorbar(image, ax=panels, shrink=0.6, pad=0.02).outline.set_visible(False)
        figure.suptitle(
            "Which experts the tasks take: mean gates", x=0.01, ha="left", weight="bold"
        )
        figure.savefig(path)
        plt.close(figure)
