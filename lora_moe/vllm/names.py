"""Where a transformers module is in vLLM's model, which fuses some modules into one layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_QKV = {"q": 0, "k": 1, "v": 2}


def places(
    path: str, model: nn.Module, modules: dict[str, nn.Module], packed: dict[str, list[str]]
) -> Iterator[tuple[str, int | None]]:
    """(name of a layer, which of its outputs; None for all of them): what the path may mean, best first.

    Args:
        path: path of the module in transformers.
        model: vLLM's model, whose hf_to_vllm_mapper knows the names of the base's own weights.
        modules: its modules by name.
        packed: {a fused layer's last name: last names of its parts}.
    """
    mapped = _mapped(path, model)
    for name, index in ([] if mapped is None else [mapped]) + [(path, None)]:
        yield name, index
        parent, dot, last = name.rpartition(".")
        for fused, parts in packed.items():
            if last in parts and index is None and len(parts) > 1:
                yield parent + dot + fused, parts.index(last)


def _mapped(path, model):
    """Through the table that maps the base's own weights."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    with_shard = getattr(mapper, "_map_name_with_shard", None)
    if with_shard is None:  # packed modules say the rest
        name = mapper.map_name(f"{path}.weight")
        return None if name is None else (name.removesuffix(".weight"), None)
    # the full name of a weight, because patterns may match its end
    found = with_shard(f"{path}.weight")
    if found is None:
        return None
    name, part = found
    part = _QKV.get(part, part)
    return name.removesuffix(".weight"), part if isinstance(part, int) else None
