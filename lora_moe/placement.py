"""What the layers share that stand for a module of the base and add experts to it, whatever they are around.

A linear module: layers.LoraMoeLinear.   A MoE model's own experts: native.LoraMoeExperts.
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
    """Stands for `base_layer`, has parameters of its own beside it, and notes its last forward.

    Attributes:
        base_layer: the module that this one stands for.
        config: LoraMoeConfig.
        routing: the Routing of the last forward in this thread, None before.  It carries that
            forward's graph, and keeps it alive until the next forward or set_routing replaces it.
            An activation checkpoint's recompute leaves it alone; copies and pickles are without it.
        routing_override: what lora_moe.set_routing put in place of the router's decision, or None.
        tasks, mask: what lora_moe.set_routing said of them, or None.
        frozen: ids of experts whose rows get an exactly zero gradient and that no optimizer moves; see
            lora_moe.freeze_experts.
        names: of its tensors, those in adapter_state().
        offsets: expert e has the rows [offsets[e], offsets[e + 1]) of each pair of pairs().
    """

    # of an adapter that PEFT knows by a name (see lora_moe.peft): the functions of this package address
    # the active ones, by the path of the module that they adapt
    adapter_name: str | None = None
    origins = None  # where each expert came from; see from_peft
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
        """Tensors and their initial values, once the layer knows which ones it has."""
        self._register(adapter_tensors(self.base_layer, self.config))
        self.reset_parameters()
        self.train(self.base_layer.training)
        self._scaling_beside(next(self.pairs())[1])  # made here, and not in a CUDA graph's capture

    def reset_parameters(self) -> None:
        """Draw the initial values again: A uniform in +-1/sqrt(D_in), B zero, the router's its own."""
        for A, B in self.pairs():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
        with torch.no_grad():
            for name, spec in self.specs().items():
                spec.init(getattr(self, name))

    def _dropped(self, x):
        """x as the experts read it, by the configuration's dropout while training."""
        dropped = self.config.dropout and self.training
        return nn.functional.dropout(x, self.config.dropout) if dropped else x

    def _register(self, tensors):
        """Memory for tensors that are on meta, beside the base."""
        device, specs = device_of(self.base_layer), self.specs()
        for name, like in tensors.items():
            if hasattr(type(self), name) or name in self.__dict__ or name in self._modules:
                raise ValueError(
                    f"{name}: expected a name that {type(self).__name__} does not use for its tensor"
                )
            tensor = torch.empty_like(like, device=device)
            if name in specs and not specs[name].trains:
                self._parameters.pop(name, None)
                self.register_buffer(name, tensor)
            else:
                self._buffers.pop(name, None)
                self.register_parameter(name, nn.Parameter(tensor))

    def specs(self) -> dict[str, TensorSpec]:
        """What router and middle ask for, by name."""
        return {}

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(lora_A, lora_B) of each linear map that it adapts."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Of the experts' rows."""
        return next(self.pairs())[0].device

    @property
    def routing(self) -> Routing | None:
        last = forward_records.record_of(self).last
        return None if last is None else last.routing

    @routing.setter
    def routing(self, nothing: None):
        if nothing is not None:
            raise ValueError(
                "routing: expected None, to forget the last forward; see lora_moe.use_routing"
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
        """`scales` as a tensor beside B, never rounded below fp32.

        No buffer: neither .half() nor .to_empty() nor loading into a module on meta can spoil it.
        """
        scaling = self._scaling
        dtype = accumulator(B.dtype)
        if scaling is None or scaling.device != B.device or scaling.dtype != dtype:
            scaling = self._scaling = torch.tensor(self.scales, dtype=dtype, device=B.device)
        return scaling

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter without its base, by name; what is pruned or parametrized is as it acts."""
        return {name: t for name in self.names if (t := getattr(self, name)) is not None}

    def release(self) -> None:
        """Leave base_layer as it was."""

    def router_parameters(self) -> list[nn.Parameter]:
        """What trains of the router, by whatever names."""
        return []

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes a state dict that was saved before the experts came, by the base's own names, too."""
        own = f"{prefix}base_layer."
        if not any(key.startswith(own) for key in state_dict):
            ours = {prefix + name for name in self.adapter_state()}
            for key in [k for k in state_dict if k.startswith(prefix) and k not in ours]:
                state_dict[own + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        """For copies and pickles: the last forward's graph stays behind."""
        held = self.routing_override
        held = held and Routing(*(t if t is None else t.detach() for t in held))
        own = ("compiled_run", "compiled_graph", "compiled_kept", "_scaling")
        return self.__dict__ | dict.fromkeys(own) | {"routing_override": held}

    def __setstate__(self, state):
        super().__setstate__(state)
        keep_rows(self)


def _as_the_base_names_it(layer, state_dict, prefix, _metadata):
    """Inside save_pretrained, `x.base_layer.weight` is `x.weight`, as in the model without experts."""
    own = f"{prefix}base_layer."
    if thread.saving:
        for key in [k for k in state_dict if k.startswith(own)]:
            state_dict[prefix + key.removeprefix(own)] = state_dict.pop(key)


def expert_ids(ids, num_experts: int) -> tuple[int, ...]:
    """Ascending ids of experts, from an int or any iterable of them; raises ValueError."""
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
