"""from_peft: combines several PEFT LoRA adapters into one bank of experts.

    lora_A (R, D_in) = the adapters' lora_A, concatenated
    lora_B (R, D_out) = the adapters' lora_B^T, concatenated;   s_e = alpha_e / r_e as in PEFT

Adapters are untrusted: unsupported features raise by name, and shapes must match the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from reprlib import repr as brief
from typing import NamedTuple

import torch
from torch import nn

from . import safefile
from .config import LoraMoeConfig
from .injection import modules_to_save, settle
from .layers import LoraMoeLinear
from .linear import linear_features
from .peft_experts import Found, experts_in
from .peft_format import shared
from .peft_lora import Lora, opened, unsupported_numbers
from .sharded import expect_no_wrapper, fill, unwrapped
from .steering import injected
from .unsupported import unsupported

# fields that the adapters or other arguments determine
_GIVEN = {
    *("num_experts", "r", "alpha", "use_rslora", "shared_a", "top_k", "adapter_dtype"),
    *("target_modules", "exclude_modules"),
}
_ROUTER = [f.name for f in dataclasses.fields(LoraMoeConfig) if f.name not in _GIVEN]


def from_peft(
    model: nn.Module,
    adapters: Iterable,
    *,
    top_k: int | None = None,
    router: Mapping | LoraMoeConfig | None = None,
    adapter_dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """Load N PEFT LoRA adapters into the model as one bank: expert i is adapters[i].

    With `use_routing(model, task_ids=i)` the model equals PEFT's model with adapter i.  The routers are new:
    train them, or override the routing.  Ranks, alphas, rsLoRA and target patterns may differ; at modules
    where an adapter has no LoRA, its expert adds zero.

    An adapter with target_parameters must be the only one: it becomes LoRAs on the model's own experts (see
    LoraMoeConfig), and its LoRAs on linear modules become banks of one expert.

    Args:
        model: the base model of the adapters, without experts; it is frozen.
        adapters: each a directory saved by PEFT, "owner/name" of a Hugging Face Hub repository, or a pair
            (state dict, configuration): peft.get_peft_model_state_dict's, and a LoraConfig or its dict.
        top_k: experts per token; see LoraMoeConfig.
        router: other fields of LoraMoeConfig (gate, temperature, router_bias, dropout, balance_coef,
            modules_to_save, ...) as a dict, or a LoraMoeConfig from which these are read.
        adapter_dtype: dtype of lora_A and lora_B; see LoraMoeConfig.
    Returns:
        The same model.
    Raises:
        ValueError: if an adapter is not a plain LoRA (DoRA, biases, embeddings, modules_to_save, ...), is
            damaged or does not fit the model; every problem is listed, and the model is unchanged.
        OSError: if a file is missing or cannot be read.
    """
    return _into(model, adapters, _router_fields(router), top_k, adapter_dtype)


def with_own_experts(model: nn.Module, source, revision, adapter_dtype) -> nn.Module:
    """load_adapter of a folder with target_parameters."""
    return _into(model, [source], {}, None, adapter_dtype, revision)


def _into(model, adapters, fields, top_k, adapter_dtype, revision=None):
    expect_no_wrapper(model)
    whole, model = model, unwrapped(model)
    if injected(model):
        raise ValueError("model: expected a model without experts, got one that has experts")
    single = isinstance(adapters, str | bytes | os.PathLike | Mapping)
    adapters = [] if single or not isinstance(adapters, Iterable) else list(adapters)
    if not adapters:
        raise ValueError("adapters: expected a non-empty list, got an empty list or no list")
    fields = fields | {"top_k": top_k, "adapter_dtype": adapter_dtype}
    with contextlib.ExitStack() as stack:
        loras = [opened(stack, i, source, revision) for i, source in enumerate(adapters)]
        own, loras = _own_experts(model, loras)
        modules = _modules_of(model, loras)
        fields["target_modules"] = {path.rpartition(".")[2] for path in modules}
        saved = _whole(model, fields.get("modules_to_save") or (), modules)
        experts = {found: found.layer(fields) for found in own}
        if own:  # its plain LoRAs: banks of one expert, with nothing to balance
            fields |= {"balance_coef": 0.0, "z_coef": 0.0}
        layers = {
            path: LoraMoeLinear(module, config_at(path, loras, fields))
            for path, module in modules.items()
        }
        if any(layer.device.type == "meta" for layer in (*layers.values(), *experts.values())):
            raise ValueError(
                "model: expected weights on a device, got the meta device; load the weights first"
            )
        for path, layer in layers.items():
            _fill(path, layer, loras)
        for found, layer in experts.items():
            _fill_experts(found, layer)
    settle(model, (*layers.values(), *experts.values()))
    for module in saved:
        module.requires_grad_(True)
    return whole


class Origin(NamedTuple):
    """The PEFT adapter that an expert, or a layer on a model's own experts, came from; for to_peft."""

    config: dict  # adapter_config.json
    # of lora_A and lora_B, None if it had no LoRA here; for a model's own experts by tensor name
    dtypes: tuple[torch.dtype, torch.dtype] | dict[str, torch.dtype] | None


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
            f"router: expected fields from {_ROUTER}, got {brief(unknown)}; the adapters determine ranks,"
            " alphas and target modules"
        )
    return {name: value for name, value in fields.items() if name in _ROUTER}


def _own_experts(model, loras) -> tuple[list[Found], list[Lora]]:
    """The adapter's LoRAs on the model's own experts, and the adapters without these."""
    named = [lora.name for lora in loras if lora.config.get("target_parameters")]
    if not named:
        return [], loras
    if len(loras) > 1:
        raise ValueError(
            f"{named[0]}: expected a plain LoRA with other adapters, got target_parameters: the"
            " model's own experts can have one LoRA each, so pass this adapter alone"
        )
    found, rest = experts_in(model, loras[0])
    return found, [rest]


def _fill_experts(found, layer):
    values = found.read(lambda key: found.lora.read(key).detach())
    for name, (value, _) in values.items():
        parameter = getattr(layer, name)
        fill(parameter, _finite(found.lora, name, value, parameter.dtype))
    dtypes = {name: dtype for name, (_, dtype) in values.items()}
    layer.origins = (Origin(found.lora.config, dtypes),)


def _whole(model, names, targets) -> list[nn.Module]:
    """The fully trained modules (modules_to_save)."""
    found = list(modules_to_save(model, names).values())
    inside = {inner for module in found for inner in module.modules()}
    both = [path for path, module in targets.items() if module in inside]
    if both:
        raise ValueError(f"modules_to_save: expected modules without a LoRA, got {both[0]}")
    return found


def _modules_of(model, loras) -> dict[str, nn.Module]:
    """{path: module} of all modules with a LoRA in any adapter; raises one error for all problems."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = list(dict.fromkeys(path for lora in loras for path in lora.paths))
    reasons = unsupported(model, [path for path in paths if path in modules])
    reasons |= {p: f"{text}, of which PEFT adapts one" for p, text in shared(model, paths).items()}
    problems = []
    for lora in loras:
        for path in lora.paths:
            reason = reasons.get(path) if path in modules else "no such module"
            found = [reason] if reason else _misfits(lora, path, modules[path])
            problems += [f"{lora.name}: {path}: {text}" for text in found]
    if problems:
        raise ValueError("adapters: expected LoRAs of this model, got\n  " + "\n  ".join(problems))
    for lora in loras:
        _tell_missing(lora, modules)
    return {path: modules[path] for path in paths}


def _tell_missing(lora, modules):
    """Warn about modules that match the adapter's target_modules but have no weights in it."""
    names, limits = lora.config.get("target_modules"), ("layers_to_transform", "exclude_modules")
    if not isinstance(names, list | tuple | set) or any(lora.config.get(k) for k in limits):
        return
    ends = tuple(f".{name}" for name in names)
    named = [path for path in modules if f".{path}".endswith(ends)]
    missing = [path for path in named if (path, "A") not in lora.tensors]
    if missing:
        warnings.warn(
            f"lora_moe: {lora.name} has no weights for {len(missing)} of {len(named)} modules that match"
            f" its target_modules ({brief(missing[0])}, ...): its expert adds zero there",
            UserWarning,
            stacklevel=4,
        )


def _misfits(lora, path, module):
    (D_in, D_out), r = linear_features(module), lora.rank(path)
    if unsupported := unsupported_numbers(r, lora.alpha(path)):
        return [unsupported]
    return lora.misfits(path, A=(r, D_in), B=(D_out, r))


def config_at(path, loras, fields) -> LoraMoeConfig:
    """Configuration of a module with the ranks and alphas of all experts; rank 1 if there is no LoRA."""
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
    filled = [some if a is None else a for a in alphas]
    return LoraMoeConfig(
        **fields,
        num_experts=len(loras),
        r=ranks[0] if len(set(ranks)) == 1 else tuple(ranks),
        alpha=filled[0] if len(set(filled)) == 1 else tuple(filled),
        use_rslora=agree and roots[present.index(True)],
    )


@torch.no_grad()
def _fill(path, layer, loras):
    """Fill the experts' rows; an expert without a LoRA here keeps its initial zero lora_B."""
    A, B, origins = layer.lora_A.detach().clone(), torch.zeros_like(layer.lora_B), []
    for e, lora in enumerate(loras):
        rows = slice(layer.offsets[e], layer.offsets[e + 1])
        dtypes = None
        if (path, "A") in lora.tensors:
            keys = [lora.tensors[path, letter] for letter in "AB"]
            a, b = (_finite(lora, key, lora.read(key).detach(), A.dtype) for key in keys)
            dtypes = tuple(safefile.DTYPES[lora.places[key].dtype] for key in keys)
            A[rows], B[rows] = a.to(A.device), b.T.to(B.device)
        origins.append(Origin(lora.config, dtypes))
    fill(layer.lora_A, A)
    fill(layer.lora_B, B)
    layer.origins = tuple(origins)


def _finite(lora, key, tensor, dtype):
    tensor = tensor.to(dtype)
    if not torch.isfinite(tensor).all():
        where = f"{lora.name}: {key}"
        raise ValueError(f"{where}: expected finite values in {dtype}, got NaN or infinity")
    return tensor
