"""The summaries in docs/ match the full tables in docs/generated/."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.static import report

DOCS = Path(__file__).parents[2] / "docs"
COLUMNS = ("target", "kernel", "registers", "spills", "shared KB", "occupancy")
ROWS = [
    ("sm_80", "shrink", 40, 0, 9.5, "100%"),
    ("sm_90", "shrink", 255, 2, 72.0, "6%"),
    ("sm_90", "expand", 64, 1, 10.0, "50%"),
]


@pytest.mark.parametrize("page", ["gpu_static.md", "cuda_static.md"])
def test_summary_matches_the_rows(page):
    rows = report.read((DOCS / "generated" / page).read_text())
    assert len(rows) > 200
    assert "\n".join(report.summary(rows)) in (DOCS / page).read_text()


def test_summary_has_the_extremes():
    rows = [dict(zip(COLUMNS, row)) for row in ROWS]
    written = "\n".join(report.table(rows))
    read = report.read(written)
    assert read == [{column: str(cell) for column, cell in row.items()} for row in rows]
    lines = list(report.summary(read))
    assert "| sm_90 | 2 | 255 | 3 | 72.0 | 6% |" in lines
    assert "| shrink | 2 | 255 | 2 | 72.0 | 6% |" in lines
    assert "| expand | 1 | 64 | 1 | 10.0 | 50% |" in lines
