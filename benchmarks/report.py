"""Tables from a run's samples: ours, the best peer, the limit, and every contender separately.

limit = max(FLOPs / best GEMM rate, bytes / bandwidth): no code on this machine can be faster.
"""

import math
import statistics
from dataclasses import dataclass

from benchmarks import scaling
from benchmarks.timing import Ratio, duration, ratio


@dataclass(frozen=True)
class Verdict:
    best: str  # the fastest peer
    gain: Ratio  # the best peer's time over ours
    limit_s: float
    of_limit: float  # limit / ours: 1 is the machine's limit
    of_own: float  # the same with the best GEMM rate of the row's own dtype


NOT_PEERS = ("ours", "plain LoRA")  # not a peer: a different function


def is_peer(name):
    return not name.startswith(NOT_PEERS)


def judge(row, limits):
    """The result of a row; None if ours or every peer was left out."""
    seconds = row["seconds"]
    names = [name for name in seconds if is_peer(name)]
    if "ours" not in seconds or not names:
        return None
    best = min(names, key=lambda name: statistics.median(seconds[name]))
    ours = statistics.median(seconds["ours"])
    rates = limits["gemm"]
    hard = limit_seconds(row, max(rates.values()), limits["bandwidth"])
    own = limit_seconds(row, rates.get(row["dtype"], max(rates.values())), limits["bandwidth"])
    return Verdict(best, ratio(seconds[best], seconds["ours"]), hard, hard / ours, own / ours)


def limit_seconds(row, gemm_rate, bandwidth):
    return max(row["flops"] / gemm_rate, row["bytes"] / bandwidth)


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def markdown(result):
    limits = result["limits"]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits["gemm"].items())
    parts = [
        f"{result['machine']}; best GEMM {rates}; copy {limits['bandwidth'] / 1e9:.1f} GB/s; "
        f"medians of {result['repeats']} interleaved turns, quartiles in brackets; "
        f"load {result['load']:.1f} before the run{'; ' * ('stopped' in result)}{result.get('stopped', '')}."
    ]
    for key in dict.fromkeys(map(heading, result["rows"])):
        rows = [row for row in result["rows"] if heading(row) == key]
        parts += [f"### {key}", verdict_table(rows, limits), contender_table(rows)]
    if result.get("scaling"):
        parts += ["### Scaling", scaling_table(result["scaling"])]
    notes = left_out(result["rows"])
    return "\n\n".join([*parts, *(["Left out:\n\n" + notes] if notes else [])]) + "\n"


def heading(row):
    return f"{row['pass']}, {row['dtype']}, {row['clock']}"


def verdict_table(rows, limits):
    lines = [
        "| shape | ours | best peer | peer / ours | of the limit | with own dtype's GEMM |",
        "|---|---:|---|---:|---:|---:|",
    ]
    gains = []
    for row in rows:
        verdict = judge(row, limits)
        if verdict is None:
            lines.append(f"| {row['text']} | not timed | | | | |")
            continue
        ours, best = (statistics.median(row["seconds"][n]) for n in ("ours", verdict.best))
        gain = verdict.gain
        gains.append(gain.median)
        lines.append(
            f"| {row['text']} | {duration(ours)} | {verdict.best} {duration(best)} "
            f"| {gain} | {verdict.of_limit:.0%} | {verdict.of_own:.0%} |"
        )
    if gains:
        lines.append(f"| geometric mean | | | {geometric_mean(gains):.2f} | | |")
    return "\n".join(lines)


def contender_table(rows):
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    lines = [f"| shape | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for row in rows:
        cells = (
            duration(statistics.median(row["seconds"][n])) if n in row["seconds"] else ""
            for n in names
        )
        lines.append(f"| {row['text']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling_table(rows):
    lines = [
        "| axis | value | dtype, pass | all | router | dA and dB | growth of the rest |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    first = {}
    for row in sorted(rows, key=lambda r: (r["axis"], r["dtype"], r["pass"], r["value"])):
        what = f"{row['dtype']}, {row['pass']}"
        begin = first.setdefault((row["axis"], what), row)
        times = [row["seconds"].get(name) for name in ("all", "router", "dA and dB")]
        cells = [duration(statistics.median(t)) if t else "" for t in times]
        cells = [row["axis"], str(row["value"]), what, *cells, f"{scaling.growth(row, begin):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def left_out(rows):
    """One line per reason, with the contenders and shapes that it applies to."""
    reasons = {}
    for row in rows:
        for name, why in row["left_out"].items():
            reasons.setdefault((name, why), []).append(
                f"{row['text']} {row['dtype']} {row['pass']}"
            )
    return "\n".join(
        f"- {name}: {why} ({where[0]}{f' and {len(where) - 1} more' if where[1:] else ''})"
        for (name, why), where in reasons.items()
    )
