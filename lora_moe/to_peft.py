"""to_peft: saves each expert of a bank as a PEFT LoRA adapter in its own folder.

    lora_A = the expert's rows of lora_A (r, D_in);   lora_B = its rows of lora_B, transposed (D_out, r)

Routers are not saved: an adapter equals its expert with weight 1.
"""

from __future__ import annotations

import collections
import json
import os
import re
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import nn

from . import peft_format, safefile
from .config import FFN
from .layers import LoraMoeLinear
from .peft_experts import expect_one_rank, names_in_order, targets_of, tensors_of
from .placement import expert_ids
from .replace import replacing
from .sharded import at_rest, plain_path, unwrapped, write_whole
from .state import modules_saved, state_of
from .steering import layers_of
from .targets import refuse


def to_peft(
    model: nn.Module, directory: str | os.PathLike, experts: int | list[int] | None = None
) -> list[Path]:
    """Write directory/expert_<id>/ with PEFT's two files for each expert.

    In PEFT, such an adapter computes the same as the model with `use_routing(model, task_ids=id)`.  An
    unchanged expert that from_peft loaded is written with the same keys, dtypes, bits and configuration.

    LoRAs on a model's own experts (target_parameters) are written as one adapter to `directory` itself,
    together with the experts of linear modules, which must have one expert each.  PEFT does not support
    dropout there.

    Args:
        model: a model with experts.
        directory: created if it does not exist; files of the same names are replaced.
        experts: expert ids; None is all experts.
    Returns:
        The folders, in the order of the ids.
    Raises:
        ValueError: if the model has no experts, layers have different numbers of experts, a layer has
            two names, an id is invalid, or a tensor has NaN or infinite values; or, with LoRAs on a
            model's own experts, if ids are given, linear modules have several experts, or ranks
            differ.  Nothing is written.
        OSError: if a file cannot be written.
    """
    whole, model = model, unwrapped(model)
    layers = {plain_path(path): layer for path, layer in layers_of(model).items()}
    _expect_what_peft_adapts(model, layers)
    if any(layer.config.target_parameters for layer in layers.values()):
        _expect_one_adapter(layers, experts)
        ids, folders = (0,), [Path(directory)]
    else:
        ids = _ids(layers, experts)
        folders = [Path(directory) / f"expert_{e}" for e in ids]
    with at_rest(whole):
        by_id = dict(zip(ids, folders))
        write_whole(whole, _sources(model, layers), lambda t: _write(model, layers, t, by_id))
    return folders


def _write(model, layers, tensors, folders):
    loras = {e: _tensors(layers, tensors, e) for e in folders}
    for e, lora in loras.items():
        _expect_finite(e, lora)
    for e, folder in folders.items():
        config = _config(model, layers, e, loras[e])
        folder.mkdir(parents=True, exist_ok=True)
        safefile.write(folder / peft_format.WEIGHTS, loras[e], {"format": "pt"})
        with replacing(folder / peft_format.CONFIG) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode())


def _expect_what_peft_adapts(model, layers):
    if "" in layers:
        raise ValueError("model: expected a module around a LoraMoeLinear, got one")
    ffns = [path for path, layer in layers.items() if layer.config.placement == FFN]
    if ffns:
        raise ValueError(f"model: expected experts on linear modules, got {ffns[0]}, an FFN")
    one = "model: expected experts on modules with a single name, as PEFT adapts only one"
    refuse(one, peft_format.shared(model, layers))


def _expect_one_adapter(layers, experts):
    if experts is not None:
        raise ValueError(
            "experts: expected None, as LoRAs on the model's own experts are one PEFT adapter, got"
            f" {brief(experts)}"
        )
    expect_one_rank({p: m for p, m in layers.items() if m.config.target_parameters})
    for path, layer in layers.items():
        if not layer.config.target_parameters and layer.config.num_experts > 1:
            raise ValueError(
                "model: expected one expert per linear module together with the model's own experts, as"
                f" PEFT requires, got {layer.config.num_experts} on {path}; use save_adapter instead"
            )


def _ids(layers, experts):
    E, *others = sorted({layer.config.num_experts for layer in layers.values()})
    if others:
        counts = [E, *others]
        raise ValueError(f"model: expected the same number of experts in each layer, got {counts}")
    if experts is None:
        return tuple(range(E))
    try:
        return expert_ids(experts, E)
    except ValueError:
        raise ValueError(
            f"experts: expected expert ids in [0, {E}), got {brief(experts)}"
        ) from None


# --- tensors ----------------------------------------------------------------------------------------


def _sources(model, layers) -> dict[tuple[str, str], torch.Tensor]:
    """{(module path, name): tensor} of the banks and the fully trained modules."""
    banks = {
        (path, name): getattr(layer, name)
        for path, layer in layers.items()
        for name in (layer.names if layer.config.target_parameters else ("lora_A", "lora_B"))
    }
    return banks | state_of(modules_saved(model, layers))


def _tensors(layers, sources, e) -> dict[str, torch.Tensor]:
    """{PEFT's key: tensor} of an expert, contiguous and with its own memory."""
    tensors = {
        f"{peft_format.PREFIX}{path}.{name}": tensor
        for (path, name), tensor in sources.items()
        if path not in layers
    }
    for path, layer in layers.items():
        if layer.config.target_parameters:
            dtypes = layer.origins[0].dtypes if layer.origins else {}
            for key, (tensor, name) in tensors_of(path, layer, sources).items():
                tensors[key] = _as_it_was(tensor, dtypes.get(name)).contiguous().clone()
            continue
        rows = slice(layer.offsets[e], layer.offsets[e + 1])
        A, B = sources[path, "lora_A"], sources[path, "lora_B"]
        pair = (A if layer.config.shared_a else A[rows]), B[rows].T
        origin = layer.origins[e] if layer.origins else None
        if origin is not None and origin.dtypes is None and not pair[1].any():
            continue  # its adapter had no LoRA here, and it still adds nothing
        dtypes = (origin and origin.dtypes) or (None, None)
        for letter, tensor, dtype in zip("AB", pair, dtypes):
            key = f"{peft_format.PREFIX}{path}.lora_{letter}.weight"
            tensors[key] = _as_it_was(tensor, dtype).contiguous().clone()
    return tensors


def _as_it_was(tensor, dtype):
    """The tensor in the dtype that it was read from, if that is still exact."""
    if dtype is None:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _expect_finite(e, tensors):
    for key, tensor in tensors.items():
        if tensor.is_meta or not torch.isfinite(tensor).all():
            got = "a tensor on meta" if tensor.is_meta else "NaN or infinity"
            raise ValueError(f"expert {e}: {key}: expected finite values, got {got}")


# --- adapter_config.json ----------------------------------------------------------------------------


def _config(model, layers, e, tensors) -> dict:
    """The configuration that was loaded if it still matches the tensors, else a new one."""
    own = {path: layer for path, layer in layers.items() if _key(path) in tensors}
    fused = {path: layer for path, layer in own.items() if layer.config.target_parameters}
    saved_paths = list(modules_saved(model, layers))
    origins = [layer.origins[e] for layer in own.values() if layer.origins]
    origin = origins[0].config if origins and None not in origins else None
    linear = {path: layer for path, layer in own.items() if path not in fused}
    from_one = len(origins) == len(own) or not fused
    if origin is not None and from_one and not saved_paths and _says(origin, linear, e):
        return origin
    return _new_config(model, own, e, saved_paths)


def _key(path):
    return f"{peft_format.PREFIX}{path}.lora_A.weight"


def _says(config, layers, e):
    """Whether the configuration's ranks and scales match the layers, and no layer was added."""
    for path, layer in layers.items():
        r, alpha = peft_format.rank_at(config, path), peft_format.alpha_at(config, path)
        scale = alpha / r**0.5 if config.get("use_rslora") else alpha / r
        known = layer.origins and layer.origins[e] and layer.origins[e].dtypes is not None
        if not known or r != layer.config.ranks[e] or abs(scale - layer.scales[e]) > 1e-12 * scale:
            return False
    return True


def _new_config(model, layers, e, saved_paths) -> dict:
    fused = {path: layer for path, layer in layers.items() if layer.config.target_parameters}
    linear = {path: layer for path, layer in layers.items() if path not in fused}
    layers = linear | {
        f"{path}.{name}": layer for path, layer in fused.items() for name in names_in_order(layer)
    }
    ranks = {path: layer.config.ranks[e] for path, layer in layers.items()}
    alphas = {path: _alpha(layer, e) for path, layer in layers.items()}
    roots = {layer.config.use_rslora for layer in layers.values()}
    if len(roots) > 1:  # one flag for all: alpha / r in each
        alphas = {path: layer.scales[e] * ranks[path] for path, layer in layers.items()}
    r, rank_pattern = _with_pattern(ranks)
    alpha, alpha_pattern = _with_pattern(alphas)
    own = {"target_parameters": targets_of(model, fused)} if fused else {}
    return own | {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": roots == {True},
        "lora_dropout": 0.0 if fused else next(iter(layers.values())).config.dropout,
        "target_modules": _targets(model, linear) if linear else [],
        "modules_to_save": saved_paths or None,
        "bias": "none",
        "fan_in_fan_out": bool(linear)
        and all(hasattr(m.base_layer, "nf") for m in linear.values()),
        "init_lora_weights": True,
    }


def _alpha(layer: LoraMoeLinear, e: int):
    alpha = layer.config.alpha
    alpha = alpha[e] if isinstance(alpha, tuple) else alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _with_pattern(values):
    """(most frequent value, {path: value} of the others), matched as PEFT does."""
    common = collections.Counter(values.values()).most_common(1)[0][0]
    others = {path: value for path, value in values.items() if value != common}
    if any(peft_format.matched(others, path, common) != v for path, v in values.items()):
        others = {f"^{re.escape(path)}": value for path, value in others.items()}
    return common, others


def _targets(model, layers):
    """Last names if these match no other module, else full paths, else a regular expression."""
    modules = [plain_path(path) for path, _ in model.named_modules()]
    modules = [path for path in modules if not any(path.startswith(f"{own}.") for own in layers)]
    for names in ({path.rpartition(".")[2] for path in layers}, set(layers)):
        ends = tuple(f".{name}" for name in names)
        if {path for path in modules if path in names or path.endswith(ends)} == set(layers):
            return sorted(names)
    return "|".join(map(re.escape, sorted(layers)))
