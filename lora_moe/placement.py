"""LoraMoeLayer: the base class of layers that replace a module of the base and add experts to it.

Subclasses: LoraMoeLinear for linear modules, LoraMoeMLP for FFNs, LoraMoeExperts for a model's own experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from . import forward_records
from .checks import rank_offsets_of
from .components import TensorSpec
from .config import LoraMoeConfig
from .context import thread
from .frozen import keep_rows
from .reference import accumulator
from .routing import Routing
from .tensors import adapter_tensors, device_of


class LoraMoeLayer(nn.Module):
    """Replaces `base_layer`, adds adapter parameters, and records its last forward.

    Attributes:
        base_layer: the module that this one replaces.
        config: LoraMoeConfig.
        routing: the Routing of the last forward in this thread, None if there is none.  It keeps that
            forward's graph alive until the next forward or set_routing replaces it.  The recompute
            of an activation checkpoint does not change it; copies and pickles do not include it.
        routing_override: the routing set by lora_moe.set_routing, or None.
        tasks, mask: set by lora_moe.set_routing, or None.
        frozen: ids of experts whose rows get a gradient of exactly zero and that no optimizer changes;
            see lora_moe.freeze_experts.
        names: names of the tensors in adapter_state().
        offsets: expert e has the rows [offsets[e], offsets[e + 1]) of each pair in pairs().
    """

    # name of a PEFT adapter (see lora_moe.peft); functions of this package apply to the active adapters, by
    # the path of the module that they adapt
    adapter_name: str | None = None
    origins = None  # the PEFT adapter of each expert; see from_peft
    tasks: Routing | int | None = None
    mask: torch.Tensor | None = None
    components = None  # (router, its tensors' names, middle, its tensors' names)
    compiled_kept = None  # see kept.keep
    active = True
    enabled = True

    def __init__(self, base: nn.Module, config: LoraMoeConfig):
        super().__init__()
        self.config = config
        self.offsets = rank_offsets_of(config.rank_offsets, config.num_experts)
        self.base_layer = base
        self.routing_override: Routing | None = None
        self.compiled_run = self.compiled_graph = None  # see records.py
        self._frozen: tuple[int, ...] = ()
        self._scaling: torch.Tensor | None = None
        self.register_state_dict_post_hook(_as_the_base_names_it)

    def _begin(self):
        """Register tensors and set initial values; called when specs() and pairs() are available."""
        self._register(adapter_tensors(self.base_layer, self.config))
        self.reset_parameters()
        self.train(self.base_layer.training)
        self._scaling_beside(next(self.pairs())[1])  # not during a CUDA graph capture

    def reset_parameters(self) -> None:
        """Draw new initial values: A uniform in +-1/sqrt(D_in), B zero, the router's as specified."""
        for A, B in self.pairs():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
        with torch.no_grad():
            for name, spec in self.specs().items():
                spec.init(getattr(self, name))

    def _dropped(self, x):
        """x after the configured dropout, in training mode."""
        dropped = self.config.dropout and self.training
        return nn.functional.dropout(x, self.config.dropout) if dropped else x

    def _register(self, tensors):
        """Allocate and register meta tensors on the base's device."""
        device, specs = device_of(self.base_layer), self.specs()
        for name, like in tensors.items():
            if hasattr(type(self), name) or name in self.__dict__ or name in self._modules:
                raise ValueError(
                    f"{name}: expected a tensor name that is not an attribute of {type(self).__name__}"
                )
            tensor = torch.empty_like(like, device=device)
            if name in specs and not specs[name].trains:
                self._parameters.pop(name, None)
                self.register_buffer(name, tensor)
            else:
                self._buffers.pop(name, None)
                self.register_parameter(name, nn.Parameter(tensor))

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that router and middle require, by name."""
        return {}

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(lora_A, lora_B) of each adapted linear layer."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the experts' rows."""
        return next(self.pairs())[0].device

    @property
    def routing(self) -> Routing | None:
        last = forward_records.record_of(self).last
        return None if last is None else last.routing

    @routing.setter
    def routing(self, nothing: None):
        if nothing is not None:
            raise ValueError(
                "routing: expected None, which clears the last forward; see lora_moe.use_routing"
            )
        forward_records.forget(self)

    @property
    def frozen(self) -> tuple[int, ...]:
        return self._frozen

    @frozen.setter
    def frozen(self, ids):
        self._frozen = expert_ids(ids, self.config.num_experts)
        keep_rows(self)

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each expert, (E,)."""
        return self.config.scales

    def _scaling_beside(self, B):
        """`scales` as a tensor on B's device, in fp32 or fp64.

        Not a buffer, so .half(), .to_empty() and loading into a module on meta do not affect it.
        """
        scaling = self._scaling
        dtype = accumulator(B.dtype)
        if scaling is None or scaling.device != B.device or scaling.dtype != dtype:
            scaling = self._scaling = torch.tensor(self.scales, dtype=dtype, device=B.device)
        return scaling

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by name, without the base; effective values if pruned or parametrized."""
        return {name: t for name in self.names if (t := getattr(self, name)) is not None}

    def release(self) -> None:
        """Restore base_layer to its original state."""

    def router_parameters(self) -> list[nn.Parameter]:
        """The router's parameters, for any kind of router."""
        return []

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also accepts a state dict with the base's original names, saved before inject."""
        own = f"{prefix}base_layer."
        if not any(key.startswith(own) for key in state_dict):
            ours = {prefix + name for name in self.adapter_state()}
            for key in [k for k in state_dict if k.startswith(prefix) and k not in ours]:
                state_dict[own + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        """For copies and pickles, without the last forward's graph."""
        held = self.routing_override
        held = held and Routing(*(t if t is None else t.detach() for t in held))
        own = ("compiled_run", "compiled_graph", "compiled_kept", "_scaling")
        return self.__dict__ | dict.fromkeys(own) | {"routing_override": held}

    def __setstate__(self, state):
        super().__setstate__(state)
        keep_rows(self)


def _as_the_base_names_it(layer, state_dict, prefix, _metadata):
    """Inside save_pretrained, rename `x.base_layer.weight` to `x.weight`, the original name."""
    own = f"{prefix}base_layer."
    if thread.saving:
        for key in [k for k in state_dict if k.startswith(own)]:
            state_dict[prefix + key.removeprefix(own)] = state_dict.pop(key)


def expert_ids(ids, num_experts: int) -> tuple[int, ...]:
    """Ascending expert ids, from an int or an iterable of ints; raises ValueError."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = [ids] if isinstance(ids, int) else ids
    try:
        ids = list(ids)
        valid = all(e == int(e) and 0 <= e < num_experts and not isinstance(e, bool) for e in ids)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise ValueError(f"frozen: expected expert ids in [0, {num_experts}), got {ids!r}")
    return tuple(sorted({int(e) for e in ids}))
