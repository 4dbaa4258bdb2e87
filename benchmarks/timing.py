"""Medians from interleaved runs: the contenders take turns, so that drift affects all of them equally."""

import statistics
import time
from dataclasses import dataclass

SAMPLE_S = 0.01  # calls are repeated until a sample takes this long
LAGGARD = 5.0  # a contender this many times slower than the fastest is timed in few turns only
LAGGARD_TURNS = 2


def once(call, calls):
    """Seconds per call, over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def warm(call, calls):
    """The same after one call to fill the caches, which another contender used before."""
    call()
    return once(call, calls)


def interleave(contenders, repeats, clock=warm, *, laggard=LAGGARD, refuse=None):
    """{name: seconds per call, one per turn} of {name: call}; each turn starts with another contender.

    Calls before the first turn are not counted.  A laggard keeps the samples of its first turns.
    refuse(name, error) is called for a contender that the clock cannot time; without it the error is raised.
    """
    calls = {}
    for name, call in contenders.items():
        try:
            calls[name] = max(1, round(SAMPLE_S / max(clock(call, 1), 1e-9)))
        except RuntimeError as error:
            if refuse is None:
                raise
            refuse(name, error)
    seconds, names = {name: [] for name in calls}, list(calls)
    for turn in range(repeats if names else 0):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(clock(contenders[name], calls[name]))
        if turn + 1 == LAGGARD_TURNS:
            best = min(map(min, seconds.values()))  # minima, as one slow turn makes no laggard
            names = [n for n in names if min(seconds[n]) <= laggard * best]
    return seconds


@dataclass(frozen=True)
class Ratio:
    """One contender's seconds over another's: median and quartiles over the turns."""

    median: float
    low: float
    high: float

    def __str__(self):
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(numerator, denominator):
    """Turn by turn, so that whatever slows a whole turn cancels."""
    values = [a / b for a, b in zip(numerator, denominator)]
    if len(values) == 1:
        return Ratio(*values * 3)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(middle, low, high)


def duration(seconds):
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def brief(seconds):
    """Medians, the fastest first."""
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return ", ".join(
        f"{name} {duration(s)}" for name, s in sorted(medians.items(), key=lambda m: m[1])
    )
