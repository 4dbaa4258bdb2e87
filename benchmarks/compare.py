"""Compares two runs: whether ours got slower relative to the best peer by more than the turns vary.

Ratios within a run are compared, so that a slower machine does not count as a regression.
"""

import math

from benchmarks import report

TOLERANCE = (
    0.10  # two runs of the same code differ by up to this much, depending on memory placement
)


def compare(old, new):
    """[(row's name, old gain, new gain, verdict)] for the rows that both runs have."""
    before, after = (
        {key(row): report.judge(row, run["limits"]) for row in run["rows"]} for run in (old, new)
    )
    return [
        (" ".join(k), before[k].gain, after[k].gain, verdict(before[k].gain, after[k].gain))
        for k in before
        if before[k] and after.get(k)
    ]


def key(row):
    return row["text"], row["dtype"], row["pass"], row["clock"]


def verdict(old, new):
    """ "regression" or "improvement" if beyond the tolerance and the quartiles do not overlap, else ""."""
    if new.median < old.median * (1 - TOLERANCE) and new.high < old.low:
        return "regression"
    if new.median > old.median / (1 - TOLERANCE) and new.low > old.high:
        return "improvement"
    return ""


def markdown(old, new):
    """The table, and whether anything regressed."""
    found = compare(old, new)
    lines = [
        "| shape | old: peer / ours | new: peer / ours | new / old | |",
        "|---|---|---|---:|---|",
    ]
    lines += [f"| {n} | {a} | {b} | {b.median / a.median:.2f} | {v} |" for n, a, b, v in found]
    if found:
        change = math.exp(sum(math.log(b.median / a.median) for _, a, b, _ in found) / len(found))
        lines.append(f"| geometric mean | | | {change:.2f} | |")
    regressions = sum(v == "regression" for *_, v in found)
    notes = [f"{len(found)} rows in both, {regressions} regressions."]
    if old["machine"] != new["machine"]:
        notes.append(f"Different machines: {old['machine']} and {new['machine']}.")
    return "\n".join([*lines, "", *notes]), regressions > 0
