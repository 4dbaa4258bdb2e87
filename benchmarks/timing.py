"""Medians from interleaved runs: the contenders take turns, so that drift hits all alike."""

import statistics
import time
from dataclasses import dataclass

LAGGARD = 5.0  # a contender so many times slower than the fastest is timed twice and no more
SAMPLE_S = 0.01  # calls are repeated until a sample takes this long
LAGGARD_TURNS = 2


def wall_clock(call, calls):
    """Seconds of one call, over `calls` of them after one that fills the caches."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def interleave(contenders, repeats, sample=wall_clock, sample_s=SAMPLE_S):
    """{name: seconds a call, one per turn} of {name: call}; each turn starts with another contender."""
    first = {name: sample(call, 1) for name, call in contenders.items()}
    calls = {name: max(1, round(sample_s / max(s, 1e-9))) for name, s in first.items()}
    seconds = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(sample(contenders[name], calls[name]))
        if turn + 1 == LAGGARD_TURNS:
            best = min(statistics.median(s) for s in seconds.values())
            names = [n for n in names if statistics.median(seconds[n]) <= LAGGARD * best]
    return seconds


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of one contender's seconds over another's, turn by turn."""

    median: float
    low: float
    high: float


def ratio(numerator, denominator):
    """Turn by turn, so that what slows a whole turn cancels."""
    values = [a / b for a, b in zip(numerator, denominator)]
    return Ratio(statistics.median(values), *quartiles(values))


def quartiles(values):
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
