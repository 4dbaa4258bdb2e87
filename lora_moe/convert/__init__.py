"""Converts published checkpoints of other packages to adapters of this one; see docs/convert.md.

Each format has a module here that documents its layout and formula.  Formats are recognized by their
configuration and keys; unsupported tensors and fields raise by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as brief
from typing import NamedTuple

from ..io import FILE_NAME
from . import bank, coin, hydralora, meteora, mixlora, moe_peft, peft, poly
from .source import Source, opened

FORMATS = (
    "mixlora", "loramoe", "mola", "hydralora", "meteora", "coin", "poly", "peft", "lora_moe",
)  # fmt: skip


class Converted(NamedTuple):
    """format: the source's format.  paths: files written.  notes: further information for the user."""

    format: str
    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    format: str | None = None,
    adapters: Iterable[str | os.PathLike] = (),
    top_k: int | None = None,
) -> Converted:
    """Convert another package's checkpoint to directory/lora_moe.safetensors, for load_adapter.

    No base model is needed or written.  An adapter of this package (format lora_moe) is converted in the
    other direction: each of its experts becomes a PEFT folder.

    Args:
        source: a folder with adapter_model or model as .safetensors or .bin, or such a file; for peft, also a
            folder of such folders, one per expert.
        directory: created if it does not exist.
        format: one of FORMATS; None detects it.
        adapters: for meteora, the folders of the imported LoRAs in the order in which they were loaded.
        top_k: experts per token for meteora (None is 2) and peft (see LoraMoeConfig), whose files lack it.
    Returns:
        Converted(format, paths, notes).
    Raises:
        ValueError: if the format is not recognized; a tensor or field is unknown (all are listed) or
            invalid; a file is damaged, or is a pickle that does more than build tensors (it is not run).
            Nothing is written.
        OSError: if a file is missing, cannot be read or cannot be written.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {brief(format)}")
    adapters = tuple(adapters)
    format = format or _by_name(Path(source))
    if format == "lora_moe":
        _expect_unused(format, adapters=adapters, top_k=top_k)
        return Converted(format, tuple(peft.write_back(source, directory)), ())
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        folders = peft.folders(source) if format in (None, "peft") else [Path(source)]
        sources = [opened(stack, folder) for folder in folders or [Path(source)]]
        format = format or _recognized(sources)
        found = _read(format, sources, notes, adapters, top_k)
        if not found:
            raise ValueError(f"{source}: expected tensors of {format}, got none")
        path = bank.write(directory, found)
    notes += [f"{s.name}: ignored {', '.join(s.beside)} next to it" for s in sources if s.beside]
    return Converted(format, (path,), tuple(notes))


def _by_name(source):
    return "lora_moe" if (source / FILE_NAME).exists() or source.name == FILE_NAME else None


def _recognized(sources: list[Source]) -> str:
    source = sources[0]
    kind = moe_peft.kind_of(source)
    if kind:
        return kind
    known = {"hydralora": hydralora, "coin": coin, "meteora": meteora, "poly": poly}
    for name, module in known.items():
        if module.fits(source):
            return name
    if source.config.get("peft_type") == "LORA":
        return "peft"
    found = source.config.get("peft_type")
    raise ValueError(
        f"{source.name}: expected one of the formats {FORMATS}, got peft_type {brief(found)} and tensors"
        f" {brief(sorted(source.places))}"
    )


def _read(format, sources, notes, adapters, top_k):
    if format == "peft":
        _expect_unused(format, adapters=adapters)
        return peft.read(sources, notes, top_k)
    (source,) = sources
    if format == "meteora":
        return meteora.read(source, notes, adapters, top_k)
    _expect_unused(format, adapters=adapters, top_k=top_k)
    if format in ("loramoe", "mola"):
        return moe_peft.read(source, notes, format)
    importers = {"mixlora": mixlora, "hydralora": hydralora, "coin": coin, "poly": poly}
    return importers[format].read(source, notes)


def _expect_unused(format, **options):
    for name, value in options.items():
        if value is not None and value != ():
            raise ValueError(
                f"{name}: expected None for {format}, whose files contain it, got {brief(value)}"
            )
