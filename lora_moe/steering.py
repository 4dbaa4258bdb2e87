"""Controls a model's experts: routing overrides, task ids, padding masks, disabling, freezing.

with use_routing(model, task_ids=ids): ...   for calls in this block and thread
set_routing(model, task_ids=ids)             for all calls in the process until the next set_routing
with disable_adapters(model): ...            runs the base only
freeze_experts(model, [0, 1])                keeps these experts unchanged
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
    """The model's LoraMoeLinear, LoraMoeMLP and LoraMoeExperts modules by (first) path; empty if none.

    For PEFT adapters (see lora_moe.peft), these are the active adapter's, by the path of the module that
    they adapt.
    """
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, LoraMoeLayer) and m.active
    }
    adapted = {adapted_path(name, layer): layer for name, layer in layers.items()}
    return adapted if len(adapted) == len(layers) else layers  # several active adapters


def adapted_path(name: str, layer: LoraMoeLayer) -> str:
    """The path of the module that a layer replaces or, as a PEFT adapter, is inside of."""
    if layer.adapter_name is None:
        return name
    return name.removesuffix(f"lora_moe_experts.{layer.adapter_name}").removesuffix(".")


def layers_of(model: nn.Module) -> dict[str, LoraMoeLayer]:
    """injected(model); raises ValueError if it is empty."""
    layers = injected(model)
    if not layers:
        raise ValueError("model: expected a model with experts (see inject), got none")
    return layers


@contextlib.contextmanager
def use_routing(
    model: nn.Module,
    task_ids: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    routing: Routing | Mapping[str, Routing] | None = None,
):
    """Override the routing of forwards inside the block, in this thread only.

    Threads can serve different requests with one model.  Blocks nest: an inner block overrides the
    arguments that it sets, and keeps the others.  The recompute of an activation checkpoint uses the
    same routing as its forward, even after the block has ended or in another thread.

    A row for a sample applies to all of its tokens, and inside `generate` also to its beams and return
    sequences.  Calling the model with another batch size raises.

    Args:
        model: a model with experts.
        task_ids: integers, (B,) one per sample or (T,) one per token.  Layers with a router or middle that
            reads tasks use them as tasks in [-1, num_tasks), -1 for none; a scalar is the task of all
            tokens.  Other layers use them as expert ids in [-1, E) with weight 1, which replace the
            router's; (B, K) or (T, K) gives several experts.
        mask: (B, L) or (T,), nonzero for the tokens that losses and statistics count; replaces the
            model's attention_mask.
        routing: a Routing for all layers, with one row per token or per sample (first dimension) of the
            layers' input; or a dict from module path to Routing, for example to replay
            {name: layer.routing}, where other layers keep their routers.  Weights that require a
            gradient get one.  A model's own experts (LoraMoeExperts) are only overridden by a dict; with
            task_ids or a single Routing, the model's router decides.
    Raises:
        ValueError: if task_ids and routing are both given, or no argument is; the model has no experts, a
            path is unknown, an id is out of range (on a CPU), or the number of experts differs.
        TypeError: if task_ids are not integers.
    """
    if task_ids is None and mask is None and routing is None:
        raise ValueError("use_routing: expected task_ids, mask or routing, got none of these")
    said = _said(model, task_ids, routing, mask)
    with deciding({layer: _told(layer, **fields) for layer, fields in said.items()}):
        yield


@contextlib.contextmanager
def disable_adapters(model: nn.Module):
    """Disable the experts inside the block, in this thread: the output equals the base's bit for bit.

    Gives the reference policy of DPO or GRPO without a second model.

    Raises:
        ValueError: if the model has no experts, or has modules_to_save, whose base values are
            overwritten.
    """
    layers = layers_of(model)
    if wrapped := whole_modules(model):
        raise ValueError(
            f"model: PEFT keeps the base values of {', '.join(wrapped)} (modules_to_save); use PEFT's"
            " `with model.disable_adapter():`, which restores them for the block"
        )
    trained = sorted({n for layer in layers.values() for n in layer.config.modules_to_save})
    if trained:
        raise ValueError(
            f"model: {', '.join(trained)} (modules_to_save) trains in place, which overwrites the"
            " base; keep a copy of the base as the reference instead"
        )
    with deciding({layer: _told(layer, disabled=True) for layer in layers.values()}):
        yield


def _told(layer, **fields) -> Decision:
    """The enclosing blocks' Decision for the layer, with these fields overridden."""
    before = thread.decisions.get(layer, Decision())
    if fields.get("tasks") is not None:  # task ids override an outer routing
        before = before._replace(routing=None)
    return before._replace(**{k: v for k, v in fields.items() if v is not None})


def set_routing(
    model: nn.Module,
    task_ids: torch.Tensor | None = None,
    routing: Routing | Mapping[str, Routing] | None = None,
    *,
    mask: torch.Tensor | None = None,
) -> None:
    """Override the routing of all following forwards, or restore the routers.

    The setting lasts until the next call, for all threads; `use_routing` overrides it in a block and
    thread.  Each call sets all layers, and clears the routing of their last forward.

    Args, Raises: as in use_routing, but without task_ids and routing the routers are restored.
        Nothing changes if it raises.
    """
    for layer, fields in _said(model, task_ids, routing, mask).items():
        layer.routing_override, layer.tasks, layer.mask = (
            fields["routing"],
            fields["tasks"],
            fields["mask"],
        )
        forward_records.forget(layer)


def _said(model, task_ids, routing, mask) -> dict[LoraMoeLayer, dict]:
    """{layer: fields of its Decision}, None for fields that are not set."""
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
    """{path: tasks on the layer's device, as a Routing over tasks} of layers that read tasks."""
    counts = {
        name: n for name, layer in layers.items() if (n := layer.config.num_tasks) is not None
    }
    if task_ids is None or not counts:
        return {}
    task_ids = _checked_ids(task_ids, min(counts.values()), "task")
    moved: dict = {}
    if task_ids.dim() > 1:
        raise ValueError(
            f"task_ids: expected (B,) or (T,), one task per sample or token, got {tuple(task_ids.shape)}"
        )
    if task_ids.dim() == 0:
        return dict.fromkeys(counts, int(task_ids))
    told = {n: Routing.from_ids(task_ids, num_experts=n) for n in set(counts.values())}
    return {name: _on_device(layers[name], told[n], moved) for name, n in counts.items()}


def _given(layers, task_ids, routing) -> dict[str, Routing]:
    """{path: Routing on the layer's device} of layers whose routing is overridden."""
    moved: dict = {}  # one copy per device
    sources = _sources(layers, task_ids, routing)
    return {name: _moved(name, layers[name], source, moved) for name, source in sources.items()}


def _sources(layers, task_ids, routing):
    if task_ids is not None and routing is not None:
        raise ValueError("routing: expected task_ids or routing, got both")
    if not isinstance(routing, Mapping):  # a common routing does not apply to a model's own experts
        named, layers = layers, {n: m for n, m in layers.items() if not m.config.target_parameters}
        if not layers and (task_ids is not None or routing is not None):
            raise ValueError(
                "routing: expected a dict of Routing by path, as the model's own router picks its"
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
    """Ids as a tensor; on a CPU, where reading is free, checked to be in [-1, E) unless E is 0."""
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
    """The caller's routing on the layer's device, without router statistics, which would be stale."""
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
    """Freeze these experts in every layer: no gradient, momentum or weight decay changes their rows.

    Their rows of lora_A and lora_B stay bitwise unchanged with any torch.optim optimizer, including
    existing and fused ones, and with FSDP2; with shared_a only their rows of lora_B, since the experts
    share A.  The router is not frozen, so tokens may still move to or from these experts.
    save_adapter saves the ids of frozen experts.

    Args:
        model: a model with experts.
        ids: expert ids, which replace the previous ones; an empty list or None unfreezes all.
    Raises:
        ValueError: if the model has no experts, or an id is not in [0, E) of every layer.
    """
    layers = layers_of(model)
    ids = () if ids is None else ids
    chosen = [(layer, expert_ids(ids, layer.config.num_experts)) for layer in layers.values()]
    for layer, experts in chosen:
        layer.frozen = experts
