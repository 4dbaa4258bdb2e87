"""Markdown for gpu_static.py and cuda_static.py: a table of all rows, and a summary.

A row is {column: cell}; `read` parses a written table, so that a summary can be checked against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Row = dict[str, object]
EXTREMES = ("rows", "most registers", "spills", "most shared KB", "lowest occupancy")


def table(rows: list[Row]) -> Iterator[str]:
    yield from _lines(rows[0], (row.values() for row in rows))


def read(text: str) -> list[Row]:
    """The rows of the first table of a page."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(columns, cells)) for cells in rows]


def summary(rows: list[Row]) -> Iterator[str]:
    """Yields the extremes of each target, and of each kernel on all targets."""
    for number, key in enumerate(("target", "kernel")):
        groups: dict[object, list[Row]] = {}
        for row in rows:
            groups.setdefault(row[key], []).append(row)
        if number:
            yield ""
        yield from _lines((key, *EXTREMES), ([name, *_extremes(g)] for name, g in groups.items()))


def _extremes(rows):
    registers, spills = ([int(row[name]) for row in rows] for name in ("registers", "spills"))
    shared = [float(row["shared KB"]) for row in rows]
    occupancy = [int(str(row["occupancy"]).rstrip("%")) for row in rows]
    return len(rows), max(registers), sum(spills), max(shared), f"{min(occupancy)}%"


def _lines(columns: Iterable, rows: Iterable[Iterable]) -> Iterator[str]:
    columns = list(columns)
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(map(str, cells))} |"
