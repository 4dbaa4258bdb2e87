"""The list of mutants that no test can distinguish from the original, each with the reason.

    lora_moe/plan.py: a < b -> a <= b
        equal costs: either plan is right

A name ends its line; the indented lines below it are the reason.  # starts a comment.
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).with_name("survivors.txt")


def read(path: Path = PATH) -> dict[str, str]:
    """{mutant's name: reason}; raises ValueError for a missing reason or a duplicate name."""
    reasons: dict[str, str] = {}
    name = None
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line[0].isspace():
            if name is None:
                raise ValueError(f"{path.name}: expected a mutant before its reason, got {line!r}")
            reasons[name] = f"{reasons[name]} {line.strip()}".strip()
        else:
            name = line.strip()
            if name in reasons:
                raise ValueError(f"{path.name}: expected each mutant once, got {name!r} again")
            reasons[name] = ""
    bare = [name for name, reason in reasons.items() if not reason]
    if bare:
        raise ValueError(
            f"{path.name}: expected a reason for each mutant, got none for {bare[0]!r}"
        )
    return reasons
