"""Maps paths of transformers modules to layers of vLLM's model, which fuses some modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_QKV = {"q": 0, "k": 1, "v": 2}


def places(
    path: str, model: nn.Module, modules: dict[str, nn.Module], packed: dict[str, list[str]]
) -> Iterator[tuple[str, int | None]]:
    """Candidates for a path, best first: (name of a layer, index of its output or None for all).

    Args:
        path: path of the module in transformers.
        model: vLLM's model, whose hf_to_vllm_mapper maps the names of the base's weights.
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
    """The candidate from the model's table for weight names."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    with_shard = getattr(mapper, "_map_name_with_shard", None)
    if with_shard is None:  # packed modules are handled by the caller
        name = mapper.map_name(f"{path}.weight")
        return None if name is None else (name.removesuffix(".weight"), None)
    # the full name of a weight, because patterns may match its end
    found = with_shard(f"{path}.weight")
    if found is None:
        return None
    name, part = found
    part = _QKV.get(part, part)
    return name.removesuffix(".weight"), part if isinstance(part, int) else None
