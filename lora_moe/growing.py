"""grow: adds experts to a model that has experts, leaving the old ones bitwise unchanged.

Letters: E experts, R rank rows of all experts together, D_in and D_out the linear's sizes.
"""

from __future__ import annotations

import dataclasses
import math
from reprlib import repr as brief

import torch
from torch import nn

from . import optimizers
from .config import FFN
from .context import thread
from .layers import LoraMoeLinear
from .routers import PerTaskRouter, Router, SequenceRouter, TaskRouter, TokenRouter, UniversalRouter
from .safefile import raise_all
from .sharded import is_sharded, is_stepped_by_zero, unwrapped
from .steering import layers_of
from .tensors import adapter_tensors, component_specs

# logit of an expert that is never picked: its softmax is exactly 0, and fp16 can represent it
NEVER = -6e4


@torch.no_grad()
def grow(
    model: nn.Module,
    n: int,
    *,
    router: str = "fresh",
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Add n experts E, ..., E + n - 1 to every layer; their lora_B is zero, so they add nothing at first.

    Rows of the old experts and their routers are bitwise unchanged, as are outputs with a routing override
    that uses old experts only (`use_routing`).  New experts have the rank and alpha of the last old one.
    top_k is kept, except that a dense token router (top_k = E > 1) stays dense.  Frozen experts stay frozen.

    Effect on the routing:

        token and sequence routers   router="fresh": new rows are initialized as in inject, so decisions for
                                     old tokens may change.  "keep": decisions stay the same, and only
                                     use_routing reaches the new experts
        PerTaskRouter, TaskRouter    existing tasks do not use the new experts
        UniversalRouter              gets n new tasks
        TaskRouter(table="expert")   gets n new tasks if there was one per expert
        any other router             "fresh" only: tensors with E rows or columns get n more, and
                                     decisions may change

    "keep" adds a bias (router_bias) of -60,000, times the temperature if that is above 1, for the new
    experts and zero for the old ones.  It is an ordinary parameter that is saved with the adapter; set the
    new experts' entries to 0 to let the router pick them.  The balance loss counts them as idle.

    Parameters that grow are new objects, while existing optimizers hold the old ones.  Pass the optimizer to
    replace its parameters; its state is kept for old rows and zero for new ones.  An optimizer that is not
    passed raises RuntimeError at its next step.

    Args:
        model: a model with experts from inject, neither wrapped nor sharded; wrap it afterwards.
        n: number of new experts, at least 1.
        router: "fresh" or "keep".
        optimizer: from torch.optim, or any whose state per parameter has the parameter's shape.
    Returns:
        The same model.
    Raises:
        ValueError: if the model is wrapped, sharded, a PEFT model or without experts; n is invalid (see
            LoraMoeConfig); the router does not support "keep"; the optimizer's state cannot grow; or
            inside a use_routing block.  Nothing is changed.
    """
    if router not in ("fresh", "keep"):
        raise ValueError(f"router: expected 'fresh' or 'keep', got {brief(router)}")
    if type(n) is not int or n < 1:
        raise ValueError(f"n: expected an integer of at least 1, got {brief(n)}")
    layers = _layers(model)
    plans = {layer: _Growth(path, layer, n, router == "keep") for path, layer in layers.items()}
    replaced = {}
    for plan in plans.values():
        replaced |= plan.replaced()
    if optimizer is not None:
        optimizers.expect_growable(optimizer, replaced)
    for plan in plans.values():
        plan.apply()
    if optimizer is not None:
        beside = {
            layer.router_bias: layer.router_weight
            for layer, plan in plans.items()
            if "router_bias" in plan.made
        }
        optimizers.replace(optimizer, replaced, beside)
    optimizers.forget(replaced)
    return model


def _layers(model) -> dict[str, LoraMoeLinear]:
    if unwrapped(model) is not model:
        raise ValueError(
            f"model: expected the unwrapped model, got a {type(model).__name__}, which keeps references to"
            " the old parameters: grow the inner model, then wrap it again"
        )
    layers, problems = layers_of(model), []
    for path, layer in layers.items():
        held = layer.adapter_state().values()
        if layer.adapter_name is not None:
            problems.append(
                f"{path}: a PEFT adapter, whose number of experts is set in PEFT's configuration"
            )
        elif any(is_sharded(t) or is_stepped_by_zero(t) for t in held):
            problems.append(f"{path}: sharded parameters: save the adapter, grow in one process")
        elif any(name not in layer._parameters | layer._buffers for name in layer.names):
            problems.append(f"{path}: pruned or parametrized tensors: remove these first")
        elif layer.config.target_parameters:
            problems.append(f"{path}: the model's own experts, whose number is fixed")
        elif layer.config.placement == FFN:
            problems.append(f"{path}: experts that are FFNs, which grow does not support")
        elif layer in thread.decisions:
            problems.append(f"{path}: inside a use_routing block: call grow outside of it")
    raise_all("model: expected layers that can grow", problems)
    return layers


class _Growth:
    """The planned growth of one layer; nothing changes before apply().

    Attributes:
        tensors: {name: tensor} of the grown layer; unchanged tensors are the same objects.
        made: names of the tensors that are new.
    """

    def __init__(self, path, layer, n, keep):
        self.layer, self.n, self.keep = layer, n, keep
        self.E = layer.config.num_experts
        try:
            self.config = self._grown(layer.config)
            like = adapter_tensors(layer.base_layer, self.config)
            self.specs = component_specs(self.config, layer.in_features, layer.out_features)
        except ValueError as error:
            raise ValueError(f"{path}: n={n}: {error}") from None
        lost = set(layer.names) - set(like)
        if lost:
            raise ValueError(
                f"{path}: expected tensors that can grow, got {sorted(lost)}, which would be lost"
            )
        self.made = {name for name in like if name not in layer.names}
        self.tensors = {name: self._tensor(path, name, t) for name, t in like.items()}

    def replaced(self) -> dict[nn.Parameter, nn.Parameter]:
        """{old parameter: new parameter}"""
        pairs = ((getattr(self.layer, name, None), new) for name, new in self.tensors.items())
        return {old: new for old, new in pairs if isinstance(old, nn.Parameter) and new is not old}

    def apply(self):
        layer = self.layer
        layer.become(self.config, self.tensors)
        layer.routing_override = _padded(layer.routing_override, self.n)
        if layer.origins:
            layer.origins = (*layer.origins, *(None,) * self.n)

    def _grown(self, config):
        E, n = self.E, self.n
        fields = {"num_experts": E + n, "router": self._router(config.router)}
        for name in ("r", "alpha"):
            value = getattr(config, name)
            fields[name] = (*value, *value[-1:] * n) if isinstance(value, tuple) else value
        if self.keep and _decides_by_token(config.router):
            fields["router_bias"] = True
        elif config.router is None and config.top_k == E > 1:
            fields["top_k"] = E + n
        return dataclasses.replace(config, **fields)

    def _router(self, router: Router | None) -> Router | None:
        match router:
            case None | TokenRouter():
                return router
            case SequenceRouter():
                return dataclasses.replace(router, then=self._router(router.then))
            case PerTaskRouter():
                known = router.experts_of(self.layer.config)
                return dataclasses.replace(router, known_experts=known)
            case UniversalRouter():
                return dataclasses.replace(router, num_tasks=router.num_tasks + self.n)
            case TaskRouter(table="expert") if router.num_tasks == self.E:
                return dataclasses.replace(router, num_tasks=router.num_tasks + self.n)
            case TaskRouter():
                return router
        if self.keep:
            raise ValueError(
                f"router: expected 'fresh' for a {type(router).__name__}, whose logits grow cannot mask,"
                " got 'keep'"
            )
        return router

    def _tensor(self, path, name, like):
        old = getattr(self.layer, name, None)
        if old is not None and old.shape == like.shape:
            return old
        beside = self.layer.router_weight if old is None else old
        new = torch.empty(like.shape, dtype=beside.dtype, device=beside.device)
        self._start(name, new)
        if old is not None:
            if any(a != b and (a, b) not in self._sizes() for a, b in zip(old.shape, new.shape)):
                raise ValueError(
                    f"{path}: {name}: expected a tensor with one row or column per expert, got"
                    f" {tuple(old.shape)}, which becomes {tuple(new.shape)}"
                )
            new[tuple(slice(size) for size in old.shape)] = old
        if name in self.specs and not self.specs[name].trains:
            return new
        return nn.Parameter(new, requires_grad=beside.requires_grad)

    def _sizes(self):
        """(before, after) of dimensions that grow with the experts."""
        return (self.E, self.E + self.n), (sum(self.layer.config.ranks), sum(self.config.ranks))

    def _start(self, name, new):
        """Initialize all rows; the caller then restores the old ones."""
        if name == "lora_A":
            nn.init.kaiming_uniform_(new, a=math.sqrt(5))
        elif name == "lora_B":
            nn.init.zeros_(new)
        else:
            self.specs[name].init(new)
            if (value := self._unseen(name)) is not None:
                new[..., self.E :] = value

    def _unseen(self, name):
        """The tensor's entry for an expert that must not be picked, or None."""
        never = NEVER * max(1.0, self.config.temperature)
        if name in ("router_bias", "selection_bias"):
            return never if self.keep else None
        router = self.config.router
        router = router.inner if isinstance(router, SequenceRouter) else router
        if name == "router_table" and isinstance(router, TaskRouter):
            return never if router.table == "logits" else 0.0
        return None


def _decides_by_token(router):
    inner = router.inner if isinstance(router, SequenceRouter) else router
    return inner is None or isinstance(inner, TokenRouter)


def _padded(decision, n):
    """A routing override for n more experts, which it does not use."""
    if decision is None:
        return None
    return decision._replace(counts=torch.cat([decision.counts, decision.counts.new_zeros(n)]))
