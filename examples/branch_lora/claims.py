"""The claims of BranchLoRA's abstract, each with its predefined metric."""

import statistics

import numpy as np

from examples.branch_lora.report import Found
from examples.common.evidence import interval, shown, table, verdict

MARGIN = 0.02  # largest loss of ACC for which sharing A still counts as equal
SURE = 0.9  # required accuracy of the selector


def claims(data, runs, seeds, seconds):
    found = Found(data, runs, seeds)

    def less(first, second, metric):
        return interval(found.items(first, metric) - found.items(second, metric))

    selected = found.tasks("BranchLoRA", lambda run: run["selected"])
    selected = selected.reshape(*selected.shape[:2], -1)
    tests = [
        (
            "a sum of LoRA experts forgets",
            "MoELoRA: -BWT",
            interval(-found.items("moelora", "BWT")),
        ),
        (
            "MoELoRA's parameters are inefficient: A can be shared",
            f"+ shared A minus MoELoRA: ACC + {100 * MARGIN:g}",
            tuple(value + MARGIN for value in less("shared A", "moelora", "ACC")),
        ),
        (
            "tuning and freezing reduces forgetting",
            "BranchLoRA minus without freezing: BWT",
            less("BranchLoRA", "no freezing", "BWT"),
        ),
        (
            "task routers do not favor the latest task",
            "BranchLoRA minus + freezing: BWT",
            less("BranchLoRA", "freezing", "BWT"),
        ),
        (
            "a selector replaces the task's identity",
            f"selector is right: share - {100 * SURE:g}",
            interval(selected - SURE),
        ),
        *(
            (
                f"BranchLoRA outperforms MoELoRA in {metric}",
                f"BranchLoRA minus MoELoRA: {metric}",
                less("BranchLoRA", "moelora", metric),
            )
            for metric in found.metrics("BranchLoRA")
        ),
    ]
    rows = [[claim, test, shown(of), verdict(of)] for claim, test, of in tests]
    return table(["claim", "measure", "points", "above 0?"], [*rows, *costs(found, seconds)])


def costs(found, seconds):
    """Rows on efficiency: parameters counted, and interleaved step times."""
    ours, theirs = (found.of(arm)[0][1]["trained"][0] for arm in ("BranchLoRA", "moelora"))
    saved = 1 - np.divide(seconds["BranchLoRA"], seconds["moelora"])
    low, high = np.quantile(saved, (0.25, 0.75))
    quartiles = (
        f"{100 * statistics.median(saved):+.1f}, quartiles [{100 * low:+.1f}, {100 * high:+.1f}]"
    )
    return [
        [
            "it trains fewer parameters",
            "share saved",
            f"{100 * (1 - ours / theirs):+.1f}",
            "counted",
        ],
        ["it trains faster", "share of a step's time saved", quartiles, "timed"],
    ]
