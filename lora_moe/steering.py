"""What the caller decides of a model's experts: routing by tasks, padding, on or off, frozen or not.

with use_routing(model, task_ids=ids): ...   for the calls of this block in this thread
set_routing(model, task_ids=ids)             for all calls of the process until the next set_routing
with disable_adapters(model): ...            the base alone
freeze_experts(model, [0, 1])                experts that no longer move
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from . import forward_records
from .checks import wrong_id
from .context import Decision, deciding, thread
from .placement import LoraMoeLayer, expert_ids
from .routing import Routing
from .sharded import whole_modules


def injected(model: nn.Module) -> dict[str, LoraMoeLayer]:
    """The model's LoraMoeLinear and LoraMoeExperts modules by their (first) path; empty if there are none.

    Of adapters that PEFT knows by names (see lora_moe.peft) these are the active one's, each by the path
    of the module that it adapts.
    """
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, LoraMoeLayer) and m.active
    }
    adapted = {adapted_path(name, layer): layer for name, layer in layers.items()}
    return adapted if len(adapted) == len(layers) else layers  # several adapters are active


def adapted_path(name: str, layer: LoraMoeLayer) -> str:
    """Of the module that a layer stands for or, as PEFT's adapter, stands in."""
    if layer.adapter_name is None:
        return name
    return name.removesuffix(f"lora_moe_experts.{layer.adapter_name}").removesuffix(".")


def layers_of(model: nn.Module) -> dict[str, LoraMoeLayer]:
    """injected(model), or ValueError where there is nothing."""
    layers = injected(model)
    if not layers:
        raise ValueError("model: expected one with LoraMoeLinear modules (see inject), got none")
    return layers


@contextlib.contextmanager
def use_routing(
    model: nn.Module,
    task_ids: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    routing: Routing | Mapping[str, Routing] | None = None,
):
    """Decide the routing of the forwards inside the block, in this thread alone.

    Several threads may each serve their own requests on one model.  Blocks nest: an inner one goes over
    what it names and keeps the rest.  An activation checkpoint that ran inside the block sees the same in
    its recompute, also after the block has ended and in another thread.

    A row serves all tokens of its sample.  Inside `generate` it also serves all of the sample's beams
    and return sequences.  A model that is called with a batch of another size raises.

    Args:
        model: with experts in it.
        task_ids: integers, (B,) one per sample or (T,) one per token.  A layer whose router or middle reads
            tasks takes them as tasks in [-1, num_tasks), -1 for none; one number is the task of all.  Any
            other layer takes them as experts in [-1, E) with weight 1, in place of its router's, (B, K) or
            (T, K) for several experts each.
        mask: (B, L) or (T,), nonzero for the tokens that losses and statistics count, in place of the
            model's attention_mask.
        routing: a Routing for all layers, with a row for each token or for each sample (first
            dimension) of the layers' input; or a dict from module path to Routing, for example a
            replay of {name: layer.routing}; layers that it does not name keep their routers.  Weights
            that require a gradient get one.  A model's own experts (LoraMoeExperts) are told by a dict
            alone: task_ids and a Routing for all leave them to the model's router.
    Raises:
        ValueError: both task_ids and routing are given, or nothing is; the model has no experts, a path
            is unknown, an id is out of range (on a CPU), or a number of experts is not the layer's.
        TypeError: task_ids are no integers.
    """
    if task_ids is None and mask is None and routing is None:
        raise ValueError("use_routing: expected task_ids, mask or routing, got none of them")
    said = _said(model, task_ids, routing, mask)
    with deciding({layer: _told(layer, **fields) for layer, fields in said.items()}):
        yield


@contextlib.contextmanager
def disable_adapters(model: nn.Module):
    """Inside the block and in this thread, the model is its base, bit for bit: no experts run.

    A reference policy for DPO or GRPO without a second model.

    Raises:
        ValueError: the model has no experts, or trains whole modules (modules_to_save), whose base
            values are gone.
    """
    layers = layers_of(model)
    if wrapped := whole_modules(model):
        raise ValueError(
            f"model: {', '.join(wrapped)} (modules_to_save) has its base kept by PEFT; use PEFT's own"
            " `with model.disable_adapter():`, which puts it back for the block"
        )
    trained = sorted({n for layer in layers.values() for n in layer.config.modules_to_save})
    if trained:
        raise ValueError(
            f"model: {', '.join(trained)} (modules_to_save) trains in place, so the base is gone;"
            " keep a copy of the base as the reference instead"
        )
    with deciding({layer: _told(layer, disabled=True) for layer in layers.values()}):
        yield


def _told(layer, **fields) -> Decision:
    """What the blocks around say of the layer, with these fields on top."""
    before = thread.decisions.get(layer, Decision())
    if fields.get("tasks") is not None:  # its router decides again
        before = before._replace(routing=None)
    return before._replace(**{k: v for k, v in fields.items() if v is not None})


def set_routing(
    model: nn.Module,
    task_ids: torch.Tensor | None = None,
    routing: Routing | Mapping[str, Routing] | None = None,
    *,
    mask: torch.Tensor | None = None,
) -> None:
    """Decide the routing of the following forwards from outside, or give it back to the routers.

    What is set stays until the next call, for every thread; `use_routing` goes over it for a block of
    code and a thread.  Each call decides for all layers, and forgets their last forward's routing.

    Args, Raises: as use_routing, but with neither task_ids nor routing the routers decide again.
        Nothing changes where it raises.
    """
    for layer, fields in _said(model, task_ids, routing, mask).items():
        layer.routing_override, layer.tasks, layer.mask = (
            fields["routing"],
            fields["tasks"],
            fields["mask"],
        )
        forward_records.forget(layer)


def _said(model, task_ids, routing, mask) -> dict[LoraMoeLayer, dict]:
    """{layer: fields of its Decision}, None for what the caller leaves open."""
    layers = layers_of(model)
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() not in (1, 2)):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected (B, L) or (T,), got {got}")
    tasks, given = _tasks(layers, task_ids), _given(layers, task_ids, routing)
    return {
        layer: {"routing": given.get(name), "mask": mask, "tasks": tasks.get(name)}
        for name, layer in layers.items()
    }


def _tasks(layers, task_ids) -> dict[str, Routing | int]:
    """{path: tasks on the layer's device, as a Routing over tasks} of the layers that read them."""
    counts = {
        name: n for name, layer in layers.items() if (n := layer.config.num_tasks) is not None
    }
    if task_ids is None or not counts:
        return {}
    task_ids = _checked_ids(task_ids, min(counts.values()), "task")
    moved: dict = {}
    if task_ids.dim() > 1:
        raise ValueError(
            f"task_ids: expected (B,) or (T,), one task each, got {tuple(task_ids.shape)}"
        )
    if task_ids.dim() == 0:
        return dict.fromkeys(counts, int(task_ids))
    told = {n: Routing.from_ids(task_ids, num_experts=n) for n in set(counts.values())}
    return {name: _on_device(layers[name], told[n], moved) for name, n in counts.items()}


def _given(layers, task_ids, routing) -> dict[str, Routing]:
    """{path: Routing on the layer's device} of the layers that the caller decides for."""
    moved: dict = {}  # one copy for all layers of a device
    sources = _sources(layers, task_ids, routing)
    return {name: _moved(name, layers[name], source, moved) for name, source in sources.items()}


def _sources(layers, task_ids, routing):
    if task_ids is not None and routing is not None:
        raise ValueError("routing: expected task_ids or routing, got both")
    if not isinstance(routing, Mapping):  # nobody's routing fits a model's own experts by chance
        named, layers = layers, {n: m for n, m in layers.items() if not m.config.target_parameters}
        if not layers and (task_ids is not None or routing is not None):
            raise ValueError(
                "routing: expected a dict of Routing by path, as the model's own router decides for its"
                f" experts: {', '.join(named)}"
            )
    if task_ids is not None:
        layers = {name: m for name, m in layers.items() if m.config.num_tasks is None}
        counts = {name: layer.config.num_experts for name, layer in layers.items()}
        task_ids = _checked_ids(task_ids, min(counts.values(), default=0), "expert")
        by_count = {E: Routing.from_ids(task_ids, num_experts=E) for E in set(counts.values())}
        return {name: by_count[E] for name, E in counts.items()}
    if not isinstance(routing, Mapping):
        return {} if routing is None else dict.fromkeys(layers, routing)
    unknown = sorted(set(routing) - set(layers))
    if unknown:
        raise ValueError(f"routing: expected paths of injected modules, got {unknown}")
    return routing


def _checked_ids(task_ids, E, what):
    """A tensor of ids; on a CPU, where reading them costs nothing, in [-1, E), if E is not 0."""
    if not isinstance(task_ids, torch.Tensor):
        try:
            task_ids = torch.as_tensor(task_ids)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"task_ids: expected a tensor of integers, got {type(task_ids).__name__}"
            ) from None
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise TypeError(f"task_ids: expected integers, got {task_ids.dtype}")
    readable = task_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if E and readable and (wrong := wrong_id(task_ids, E)) is not None:
        raise ValueError(f"task_ids: expected {what} ids in [-1, {E}), got {wrong}")
    return task_ids


def _moved(name, layer, routing, moved):
    """The caller's decision on the layer's device, without a router's statistics: they are stale."""
    if not isinstance(routing, Routing):
        raise ValueError(f"routing: expected a Routing, got {type(routing).__name__}")
    if routing.num_experts != layer.config.num_experts:
        raise ValueError(
            f"routing: expected {layer.config.num_experts} experts for {name},"
            f" got {routing.num_experts}"
        )
    return _on_device(layer, routing, moved)


def _on_device(layer, routing, moved):
    device = layer.device
    key = id(routing), device
    if key not in moved:
        moved[key] = Routing(*(t.to(device) for t in routing[:3]))
    return moved[key]


def freeze_experts(model: nn.Module, ids: int | Iterable[int] | None) -> None:
    """Hold these experts still in every layer: no gradient, momentum or weight decay moves their rows.

    Their rows of lora_A and lora_B keep their bits under any torch.optim optimizer, also one that was
    made before, fused ones and FSDP2's shards; with shared_a only their rows of lora_B, as the others need
    A.  The router's rows are not frozen: tokens may still move to or from these experts.  save_adapter
    saves which experts are frozen.

    Args:
        model: with experts in it.
        ids: experts, in place of those that were frozen before; an empty list or None frees all.
    Raises:
        ValueError: the model has no experts, or an id is not in [0, E) of each layer.
    """
    layers = layers_of(model)
    ids = () if ids is None else ids
    chosen = [(layer, expert_ids(ids, layer.config.num_experts)) for layer in layers.values()]
    for layer, experts in chosen:
        layer.frozen = experts
