"""LoraMoeLinear: a frozen linear map plus a mixture of LoRA experts, in place of nn.Linear.

    y_t = W0 x_t + b + sum over e in topk(router(x_t)) of  g_te * s_e * B_e A_e x_t

Letters: T tokens (all leading dimensions of x together), E experts, R rank rows of all experts
together, r one expert's rank, D_in and D_out the linear's sizes.
"""

from __future__ import annotations

import torch
from torch import nn

from . import forward_records
from . import functional as F
from .base_backward import base_weight
from .checks import autocast_enabled, rank_offsets_of
from .components import Batch, TensorSpec
from .config import LoraMoeConfig
from .context import fit_rows, sample_rows, told
from .linear import linear_features
from .per_sample import add_mixed, pays
from .placement import LoraMoeLayer
from .recompute import recomputing
from .routers import TokenRouter
from .routers.token import tempered
from .routing import Routing
from .rows import for_tokens
from .tensors import component_specs
from .tokens import tokens_of

TENSORS = ("lora_A", "lora_B", "router_weight", "router_bias", "selection_bias")


class LoraMoeLinear(LoraMoeLayer):
    """A drop-in for `base`: its own forward, plus the experts.

        y_t = base(x_t) + sum over e in topk(router(x_t)) of  g_te * s_e * B_e A_e x_t

    Parameters are lora_A (R, D_in), or (r, D_in) with shared_a; lora_B (R, D_out), whose row r
    pairs with row r of lora_A; router_weight (E, D_in); and router_bias (E,) if the configuration
    asks for it, as it may for a buffer selection_bias (E,).  A router or middle of the configuration
    brings its own in place of the router's.  The router is fp32, and so are lora_A and
    lora_B unless adapter_dtype says otherwise (all fp64 for an fp64 base).  Any later .to(dtype) works
    too: the router's products are full fp32 in each case.

    Initial values come from torch's default generator: lora_A uniform in +-1/sqrt(D_in) as in PEFT,
    lora_B zero, so that the layer starts as `base` bit for bit, router_weight normal with std 0.02,
    router_bias zero.  In a backward every parameter gets a gradient, zero for an expert that no token
    picked and for a router in whose place the caller decided, so that DDP finds all of them.  An
    optimizer's weight decay still moves a router with a zero gradient, unless its group has none.

    Attributes: as placement.LoraMoeLayer; `weight` and `bias` are base_layer's own.

    Args:
        base: nn.Linear, or a module that behaves like one: it has in_features and out_features, is
            transformers' Conv1D, or has a two-dimensional weight (D_out, D_in).
        config: LoraMoeConfig; which modules it names does not matter here.
    Raises:
        TypeError: base is no linear module, or already a LoraMoeLinear.
    """

    base_layer: nn.Linear  # or a module like it
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Module, config: LoraMoeConfig):
        features = linear_features(base)
        if features is None or isinstance(base, LoraMoeLinear):
            raise TypeError(f"base: expected a linear module, got {type(base).__name__}")
        if not isinstance(config, LoraMoeConfig):
            raise TypeError(f"config: expected a LoraMoeConfig, got {type(config).__name__}")
        super().__init__(base, config)
        self.in_features, self.out_features = features
        self._note_components()
        for name in TENSORS[:-1]:  # in this order
            self.register_parameter(name, None)
        self.register_buffer("selection_bias", None)
        self._begin()

    def _note_components(self):
        """What of the configuration is neither the token router nor the gate, and its tensors' names."""
        config, sizes = self.config, (self.in_features, self.out_features)
        router, middle = config.router or TokenRouter(), config.middle
        own = tuple(router.tensors(config, *sizes))
        between = () if middle is None else tuple(middle.tensors(config, *sizes))
        plain = config.router is None and middle is None
        self.components = None if plain else (router, own, middle, between)
        self.names = ("lora_A", "lora_B", *own, *between)

    def specs(self) -> dict[str, TensorSpec]:
        """What router and middle ask for, by name."""
        return component_specs(self.config, self.in_features, self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """base_layer.weight: some models look at it (T5 reads its dtype)."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    @property
    def scaling(self) -> torch.Tensor:
        """`scales` as a tensor beside lora_B, never rounded below fp32."""
        return self._scaling_beside(self.lora_B)

    def pairs(self):
        yield self.lora_A, self.lora_B

    def become(self, config: LoraMoeConfig, tensors: dict[str, torch.Tensor]) -> None:
        """Take another configuration, and the tensors that it asks for (see tensors.adapter_tensors).

        A parameter stays the same object where it is in `tensors`.  Frozen experts stay frozen.
        """
        self.config = config
        self.offsets = rank_offsets_of(config.rank_offsets, config.num_experts)
        self._scaling = None
        self._note_components()
        for name, tensor in tensors.items():
            known: dict = self._parameters if isinstance(tensor, nn.Parameter) else self._buffers
            known[name] = tensor
        self.frozen = self._frozen
        forward_records.forget(self)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """base_layer(x, ...) plus the experts, in the base's dtype.  (..., D_in) -> (..., D_out)"""
        plain = self.components is None and not (self.training and self.config.dropout)
        weight = None if args or kwargs or not plain else base_weight(self.base_layer, x)
        if weight is None:
            return self.adapt(x, self.base_layer(x, *args, **kwargs))
        decision = told(self, x)
        if decision.disabled:
            return self.base_layer(x)
        with torch.no_grad():  # the experts' backward does the base's as well
            y = self.base_layer(x)
        return self._adapt(x, y, decision, weight)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y, the base's output for x, plus the experts; what the caller decided and records included."""
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"base_layer: expected a tensor from it, got {type(y).__name__}")
        decision = told(self, x)
        return y if decision.disabled else self._adapt(x, y, decision)

    def _adapt(self, x, y, decision, weight=None):
        tokens = tokens_of(x, decision)
        device = "cpu" if x.is_cpu else x.device.type
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # the base has decided on y's dtype
                y, routing = self._add(x.to(y.dtype), y, decision)
        else:
            x = x if x.dtype == y.dtype else x.to(y.dtype)
            y, routing = self._add(x, y, decision, weight)
        if not recomputing():
            forward_records.remember(self, routing, tokens)
        return y

    def _add(self, x, y, decision, weight=None):
        if self.components is None:
            return self.add_experts(x, y, decision.routing, weight)
        return self._add_with_components(x, y, decision)

    def _add_with_components(self, x, base, decision):
        router, own, middle, between = self.components
        batch = Batch(self, decision)
        if decision.routing is not None:
            routing = fit_rows(decision.routing, x)
            samples = sample_rows(decision.routing, x)
        else:
            tensors = {name: getattr(self, name) for name in own}
            samples = router.per_sample(x, tensors, batch)
            if samples is None:
                routing = router.route(x, tensors, batch)
            else:
                routing = for_tokens(samples, x)
        x = self._dropped(x)
        if middle is not None:
            tensors, batch = {n: getattr(self, n) for n in between}, batch._replace(samples=samples)
            y = middle.mix(x, base, routing, tensors, batch)
        else:
            y = self._gated(x, base, routing, samples)
        # each parameter gets a gradient, also of a task that the batch has not
        return with_zero_gradients(y, *(getattr(self, name) for name in (*own, *between))), routing

    def add_experts(
        self,
        x: torch.Tensor,
        base: torch.Tensor,
        routing_override: Routing | None = None,
        base_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing]:
        """base + the experts' sum by the token router, and the routing taken.

        `routing_override` stands in for the router's decision.

        x (..., D_in) and base (..., D_out) have the same dtype; base_weight as in functional.grouped_lora.
        """
        config = self.config
        A, B, router_weight, router_bias, selection_bias = self._tensors()
        scaling = self._scaling_beside(B)
        if routing_override is not None:
            routing = fit_rows(routing_override, x)
        else:
            weight, bias = tempered(config, router_weight, router_bias)
            if not (self.training and config.dropout):
                return F.routed_lora(
                    x, weight, A, B, config.top_k, rank_offsets=self.offsets, scaling=scaling,
                    shared_a=config.shared_a, base=base, gate=config.gate, renormalize=config.normalizes,
                    bias=selection_bias, top_p=config.top_p, threshold=config.threshold,
                    frozen=self._frozen, router_bias=bias, base_weight=base_weight,
                )  # fmt: skip
            routing = F.router_topk(
                x, weight, config.top_k, gate=config.gate, renormalize=config.normalizes,
                bias=selection_bias, top_p=config.top_p, threshold=config.threshold, router_bias=bias,
            )  # fmt: skip
        samples = None if routing_override is None else sample_rows(routing_override, x)
        y = self._gated(self._dropped(x), base, routing, samples, base_weight)
        if routing_override is not None:
            y = with_zero_gradients(y, router_weight, router_bias)
        return y, routing

    def _gated(self, x, base, routing, samples=None, base_weight=None):
        """base + the experts' sum; where all experts of a shared A are used, B may be mixed per sample."""
        config = self.config
        dense = samples is not None and samples.indices.shape[1] == config.num_experts
        dense = dense and config.top_p is None and config.threshold is None
        if dense and config.shared_a and pays(self, x, samples):
            return add_mixed(self, x, base, samples, base_weight=base_weight)
        return F.grouped_lora(
            x, self.lora_A, self.lora_B, routing, rank_offsets=self.offsets, scaling=self.scaling,
            shared_a=config.shared_a, base=base, frozen=self._frozen, base_weight=base_weight,
        )  # fmt: skip

    def _tensors(self):
        """By the dictionaries that hold them: an attribute of a module takes ten times as long to look up."""
        try:
            p = self._parameters
            adapter = p["lora_A"], p["lora_B"], p["router_weight"], p["router_bias"]
            return *adapter, self._buffers["selection_bias"]
        except KeyError:  # pruned or parametrized
            return tuple(getattr(self, name) for name in TENSORS)

    def router_parameters(self) -> list[nn.Parameter]:
        """What trains of the router, by whatever names."""
        own = self.components[1] if self.components else ("router_weight", "router_bias")
        return [p for name in own if isinstance(p := getattr(self, name), nn.Parameter)]

    def extra_repr(self) -> str:
        c = self.config
        adapter = sum(t.numel() for t in self.adapter_state().values())
        if self.components is not None:
            chosen = "".join(f", {p}" for p in (c.router, c.middle) if p is not None)
            return (
                f"in_features={self.in_features}, out_features={self.out_features},"
                f" num_experts={c.num_experts}, r={c.r}{chosen}, parameters={adapter:,}"
            )
        idle = sum(sorted(c.ranks)[: c.num_experts - c.top_k])  # rows that no token can be using
        widths = self.out_features + (0 if c.shared_a else self.in_features)
        alpha = f"{c.alpha:g}" if isinstance(c.alpha, float) else c.alpha
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" num_experts={c.num_experts}, top_k={c.top_k}, r={c.r}, alpha={alpha},"
            f" gate={c.gate}, shared_a={c.shared_a}, dropout={c.dropout:g},"
            f" parameters={adapter:,} ({adapter - idle * widths:,} per token)"
        )


class _ZeroGradients(torch.autograd.Function):
    """y, with a zero gradient for parameters that had no part in it."""

    @staticmethod
    def forward(ctx, y, *parameters):
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def with_zero_gradients(y: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
    """y; in its backward each of the parameters that trains gets a zero gradient."""
    trained = [p for p in parameters if p is not None and p.requires_grad]
    return _ZeroGradients.apply(y, *trained) if trained and torch.is_grad_enabled() else y
