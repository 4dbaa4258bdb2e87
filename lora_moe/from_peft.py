"""Several LoRA adapters of PEFT become one bank of experts.

    lora_A (R, D_in) = the adapters' lora_A, one under the other
    lora_B (R, D_out) = their lora_B, transposed, one under the other;   s_e = alpha_e / r_e as PEFT has it

An adapter is untrusted input: what it would lose here is refused by name, and shapes are the model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as brief
from typing import NamedTuple

import torch
from torch import nn

from . import locate, peft_format, safefile
from .attach import attach
from .config import MAX_COEFFICIENT, MAX_RANK, LoraMoeConfig
from .inject import freeze_base, place
from .layers import LoraMoeLinear, linear_features
from .peft_format import shared
from .sharded import expect_no_wrapper, fill, unwrapped
from .steering import injected
from .unfit import unfit

_KEY = re.compile(r"([\w.]+)\.lora_([AB])\.weight", re.ASCII)
# say what the LoRA's function is, and are carried over
_CARRIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# say where it is, which its tensors say, too, or nothing about the trained function
_SILENT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# others change the base's weights, so that the saved LoRA belongs to a base that the model does not have
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_GIVEN = ("num_experts", "r", "alpha", "use_rslora", "shared_a", "top_k", "adapter_dtype")
_ROUTER = [f.name for f in dataclasses.fields(LoraMoeConfig) if f.name not in _GIVEN]


def from_peft(
    model: nn.Module,
    adapters: Iterable,
    *,
    top_k: int | None = None,
    router: Mapping | LoraMoeConfig | None = None,
    adapter_dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """Put N LoRA adapters of PEFT into the model as one bank: expert i is adapters[i].

    With `use_routing(model, task_ids=i)` the model is what PEFT makes of adapter i.  The routers are new:
    train them, or decide from outside.  Ranks, alphas, rsLoRA and patterns may differ; where an adapter has
    no LoRA at a module that another one has, its expert adds zero.

    Args:
        model: without experts, the base that the adapters were trained on; it is frozen.
        adapters: each one a directory that PEFT saved, "owner/name" of a repository of the hub, or a pair
            (state dict, configuration) as of peft.get_peft_model_state_dict and a LoraConfig or its dict.
        top_k: experts per token; see LoraMoeConfig.
        router: other fields of LoraMoeConfig (gate, temperature, router_bias, dropout, balance_coef, ...)
            as a dict, or a LoraMoeConfig whose fields are taken.
        adapter_dtype: of lora_A and lora_B; see LoraMoeConfig.
    Returns:
        The same model.
    Raises:
        ValueError: an adapter is no plain LoRA (DoRA, biases, embeddings, modules_to_save, ... are named),
            is damaged or does not fit the model; every misfit is listed, and the model is unchanged.
        OSError: a file is missing or cannot be read.
    """
    expect_no_wrapper(model)
    whole, model = model, unwrapped(model)
    if injected(model):
        raise ValueError("model: expected one without experts, got one that has them")
    single = isinstance(adapters, str | bytes | os.PathLike | Mapping)
    adapters = [] if single or not isinstance(adapters, Iterable) else list(adapters)
    if not adapters:
        raise ValueError("adapters: expected a list of one or more, got none or no list")
    fields = _router_fields(router) | {"top_k": top_k, "adapter_dtype": adapter_dtype}
    with contextlib.ExitStack() as stack:
        loras = [_opened(stack, i, source) for i, source in enumerate(adapters)]
        modules = _modules_of(model, loras)
        names = {path.rpartition(".")[2] for path in modules}
        fields = {"target_modules": names} | fields
        layers = {
            path: LoraMoeLinear(module, _config_at(path, loras, fields))
            for path, module in modules.items()
        }
        if any(layer.lora_A.is_meta for layer in layers.values()):
            raise ValueError(
                "model: expected weights on a device, got the meta device; load them first"
            )
        for path, layer in layers.items():
            _fill(path, layer, loras)
    place(model, {layer.base_layer: layer for layer in layers.values()})
    attach(model)
    freeze_base(model)
    return whole


class Origin(NamedTuple):
    """Where an expert of a layer came from: to_peft gives it back as it was."""

    config: dict  # adapter_config.json
    dtypes: tuple[torch.dtype, torch.dtype] | None  # of lora_A and lora_B; None where it had none


class Lora(NamedTuple):
    """An adapter that has been checked by itself, and of which no tensor has been read."""

    name: str  # for messages
    config: dict
    tensors: dict[tuple[str, str], str]  # (module path, "A" or "B"): key
    places: dict[str, safefile.Slice]  # of each key; of a state dict, dtype and shape only
    read: Callable[[str], torch.Tensor]

    def value(self, path: str, field: str, patterns: str):
        """r or lora_alpha at a module."""
        default = self.config.get(field, 8)
        return peft_format.matched(self.config.get(patterns) or {}, path, default)

    def rank(self, path: str):
        return self.value(path, "r", "rank_pattern")

    def alpha(self, path: str):
        return self.value(path, "lora_alpha", "alpha_pattern")

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys(path for path, _ in self.tensors))


# --- one adapter ------------------------------------------------------------------------------------


def _opened(stack, index, source) -> Lora:
    if isinstance(source, str | os.PathLike):
        found = locate.find(source, (peft_format.FILES,))
        if found is None:
            raise FileNotFoundError(_nothing(source))
        file = stack.enter_context(safefile.open_regular(found[0]))
        _, places = safefile.read_header(file)
        config = peft_format.read_config(found[1])
        return _checked(
            str(source), config, places, lambda key: safefile.read_tensor(file, places[key])
        )
    pair = isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], Mapping)
    config = _as_dict(source[1]) if pair else None
    if config is None:
        raise ValueError(
            f"adapters[{index}]: expected a directory or a pair (state dict, LoraConfig), without which"
            f" ranks and alphas are not known, got {brief(source)[:80]}"
        )
    state = source[0]
    names = {dtype: name for name, dtype in safefile.DTYPES.items()}
    odd = [key for key, t in state.items() if not isinstance(t, torch.Tensor)]
    if odd:
        raise ValueError(f"adapters[{index}]: expected tensors, got {type(state[odd[0]]).__name__}")
    places = {
        key: safefile.Slice(names.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, 0)
        for key, t in state.items()
    }
    return _checked(f"adapters[{index}]", config, places, state.__getitem__)


def _nothing(source):
    hint = ""
    if os.path.isdir(source):
        found = sorted(os.listdir(source))[:20]
        if "adapter_model.bin" in found:
            hint = (
                "; a pickle runs code and is not opened: save it anew with safe_serialization=True"
            )
        hint = f", found {found}{hint}"
    return f"{source}: expected {' and '.join(peft_format.FILES)} in it{hint}"


def _as_dict(config):
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        return None
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def _checked(name, config, places, read) -> Lora:
    """Nothing that a bank does not hold may stand in the configuration or the tensors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{name}: expected peft_type 'LORA', got {brief(kind)}")
    lost = _lost(config)
    tensors, strange = {}, []
    for key in places:
        match = _KEY.fullmatch(peft_format.module_path(key))
        if match and match.groups() not in tensors:
            tensors[match.groups()] = key
        else:
            strange.append(key)
    lost += [f"tensor {ascii(key)[:200]}" for key in strange[:8]]
    if lost or strange:
        raise ValueError(
            f"{name}: expected a plain LoRA on linear modules, got {', '.join(lost)}"
            f"{f' and {len(strange) - 8} more tensors' if strange[8:] else ''},"
            " which a bank of experts cannot hold"
        )
    if not tensors:
        raise ValueError(f"{name}: expected tensors, got none")
    config = dict(config)
    for field in ("rank_pattern", "alpha_pattern"):
        peft_format.expect_patterns(f"{name}: {field}", config.get(field))
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"{name}: use_rslora: expected a bool, got {brief(config['use_rslora'])}")
    return Lora(name, config, tensors, places, read)


def _lost(config):
    """What of a configuration would be lost, as field=value."""
    found = []
    for field, value in config.items():
        if field == "init_lora_weights" and value not in _PLAIN_STARTS:
            found.append(
                f"{field}={brief(value)} (it changes the base; save it with"
                " path_initial_model_for_weight_conversion=)"
            )
        elif field not in _CARRIED | _SILENT and value not in (None, False, "none", [], {}, ""):
            found.append(f"{field}={brief(value)}")
    return found


# --- all adapters and the model ---------------------------------------------------------------------


def _router_fields(router) -> dict:
    if router is None:
        return {}
    given = isinstance(router, LoraMoeConfig)
    fields = router.to_dict() if given else router
    if not isinstance(fields, Mapping):
        raise ValueError(f"router: expected a dict of LoraMoeConfig's fields, got {brief(router)}")
    unknown = [name for name in fields if name not in _ROUTER]
    if unknown and not given:
        raise ValueError(
            f"router: expected some of {_ROUTER}, got {brief(unknown)}; ranks, alphas and places are the"
            " adapters'"
        )
    return {name: value for name, value in fields.items() if name in _ROUTER}


def _modules_of(model, loras) -> dict[str, nn.Module]:
    """{path: module} of all that any adapter names; raises for every misfit at once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = list(dict.fromkeys(path for lora in loras for path in lora.paths))
    reasons = unfit(model, [path for path in paths if path in modules])
    reasons |= {p: f"{text}, of which PEFT adapts one" for p, text in shared(model, paths).items()}
    problems = []
    for lora in loras:
        for path in lora.paths:
            reason = reasons.get(path) if path in modules else "no such module"
            found = [reason] if reason else _misfits(lora, path, modules[path])
            problems += [f"{lora.name}: {path}: {text}" for text in found]
    if problems:
        raise ValueError("adapters: expected LoRAs of this model, got\n  " + "\n  ".join(problems))
    return {path: modules[path] for path in paths}


def _misfits(lora, path, module):
    D_in, D_out = linear_features(module)
    r, alpha = lora.rank(path), lora.alpha(path)
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        return [f"r: expected an integer in [1, {MAX_RANK}], got {brief(r)}"]
    if type(alpha) not in (int, float) or not 0 <= alpha <= MAX_COEFFICIENT:
        return [f"lora_alpha: expected a number in [0, {MAX_COEFFICIENT:g}], got {brief(alpha)}"]
    problems = []
    for letter, shape in (("A", (r, D_in)), ("B", (D_out, r))):
        key = lora.tensors.get((path, letter))
        if key is None:
            problems.append(f"lora_{letter} is missing")
            continue
        dtype, got = lora.places[key][:2]
        if got != shape:
            problems.append(f"lora_{letter}: expected {shape}, got {got}")
        if dtype not in safefile.DTYPES:
            problems.append(f"lora_{letter}: expected one of {list(safefile.DTYPES)}, got {dtype}")
    return problems


def _config_at(path, loras, fields) -> LoraMoeConfig:
    """Ranks and alphas of all experts at a module; rank 1 where an adapter has none."""
    present = [(path, "A") in lora.tensors for lora in loras]
    ranks = [lora.rank(path) if here else 1 for lora, here in zip(loras, present)]
    alphas = [float(lora.alpha(path)) if here else None for lora, here in zip(loras, present)]
    roots = [lora.config.get("use_rslora", False) for lora in loras]
    agree = len({root for root, here in zip(roots, present) if here}) == 1
    if not agree:  # the scale is alpha / sqrt(r) = (alpha sqrt(r)) / r
        alphas = [
            a * math.sqrt(r) if root and a is not None else a
            for a, r, root in zip(alphas, ranks, roots)
        ]
    some = next(a for a in alphas if a is not None)
    alphas = [some if a is None else a for a in alphas]
    return LoraMoeConfig(
        **fields,
        num_experts=len(loras),
        r=ranks[0] if len(set(ranks)) == 1 else tuple(ranks),
        alpha=alphas[0] if len(set(alphas)) == 1 else tuple(alphas),
        use_rslora=agree and roots[present.index(True)],
    )


@torch.no_grad()
def _fill(path, layer, loras):
    """The experts' rows; an expert without a LoRA here keeps its start, whose lora_B is zero."""
    A, B, origins = layer.lora_A.detach().clone(), torch.zeros_like(layer.lora_B), []
    for e, lora in enumerate(loras):
        rows = slice(layer.offsets[e], layer.offsets[e + 1])
        dtypes = None
        if (path, "A") in lora.tensors:
            a, b = (_read(lora, lora.tensors[path, letter], A.dtype) for letter in "AB")
            dtypes = tuple(
                safefile.DTYPES[lora.places[lora.tensors[path, letter]].dtype] for letter in "AB"
            )
            A[rows], B[rows] = a.to(A.device), b.T.to(B.device)
        origins.append(Origin(lora.config, dtypes))
    fill(layer.lora_A, A)
    fill(layer.lora_B, B)
    layer.origins = tuple(origins)


def _read(lora, key, dtype):
    tensor = lora.read(key).detach().to(dtype)
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{lora.name}: {key}: expected finite values in {dtype}, got NaN or infinity"
        )
    return tensor
