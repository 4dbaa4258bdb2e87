"""LoraMoeLinear: a frozen linear layer plus a mixture of LoRA experts, in place of nn.Linear.

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
    """A drop-in replacement for `base` that adds the experts to its output.

        y_t = base(x_t) + sum over e in topk(router(x_t)) of  g_te * s_e * B_e A_e x_t

    Parameters are lora_A (R, D_in), or (r, D_in) with shared_a; lora_B (R, D_out), whose row i
    pairs with row i of lora_A; router_weight (E, D_in); and router_bias (E,) if configured.
    selection_bias (E,) is a buffer, if configured.  A router or middle in the configuration
    registers its own tensors instead of the token router's.  The router is fp32, and so are lora_A
    and lora_B unless adapter_dtype is set (all fp64 for an fp64 base).  A later .to(dtype) works
    too; the router is always computed in full fp32.

    Initial values use torch's default generator: lora_A is uniform in +-1/sqrt(D_in) as in PEFT;
    lora_B is zero, so the initial output equals that of `base` bit for bit; router_weight is normal
    with std 0.02; router_bias is zero.  In backward every parameter gets a gradient, as DDP requires:
    zero for experts that no token picked and for an overridden router.  An optimizer's weight decay
    still changes parameters with a zero gradient.

    Attributes: as in placement.LoraMoeLayer; `weight` and `bias` are base_layer's.

    Args:
        base: nn.Linear, or a module that behaves like one: it has in_features and out_features, is
            transformers' Conv1D, or has a two-dimensional weight (D_out, D_in).
        config: LoraMoeConfig; its module patterns are ignored.
    Raises:
        TypeError: if base is not a linear module, or is already a LoraMoeLinear.
    """

    base_layer: nn.Linear  # or a similar module
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
        """Set `components`, None for the default token router and gate, and the tensor names."""
        config, sizes = self.config, (self.in_features, self.out_features)
        router, middle = config.router or TokenRouter(), config.middle
        own = tuple(router.tensors(config, *sizes))
        between = () if middle is None else tuple(middle.tensors(config, *sizes))
        plain = config.router is None and middle is None
        self.components = None if plain else (router, own, middle, between)
        self.names = ("lora_A", "lora_B", *own, *between)

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that router and middle require, by name."""
        return component_specs(self.config, self.in_features, self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """base_layer.weight, since some models read it (T5 reads its dtype)."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    @property
    def scaling(self) -> torch.Tensor:
        """`scales` as a tensor on lora_B's device, in fp32 or fp64."""
        return self._scaling_beside(self.lora_B)

    def pairs(self):
        yield self.lora_A, self.lora_B

    def become(self, config: LoraMoeConfig, tensors: dict[str, torch.Tensor]) -> None:
        """Set another configuration and its tensors (see tensors.adapter_tensors).

        Parameters in `tensors` stay the same objects.  Frozen experts stay frozen.
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
        with torch.no_grad():  # the experts' backward includes the base's
            y = self.base_layer(x)
        return self._adapt(x, y, decision, weight)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y, the base's output for x, plus the experts; uses the caller's settings; records the forward."""
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"base_layer: expected it to return a tensor, got {type(y).__name__}")
        decision = told(self, x)
        return y if decision.disabled else self._adapt(x, y, decision)

    def _adapt(self, x, y, decision, weight=None):
        tokens = tokens_of(x, decision)
        device = "cpu" if x.is_cpu else x.device.type
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # y already has the base's dtype
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
        # every parameter gets a gradient, also those of tasks that are not in the batch
        return with_zero_gradients(y, *(getattr(self, name) for name in (*own, *between))), routing

    def add_experts(
        self,
        x: torch.Tensor,
        base: torch.Tensor,
        routing_override: Routing | None = None,
        base_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing]:
        """base + the experts' weighted sum, and the routing of the token router.

        `routing_override` replaces the router's decision.

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
        """base + the experts' sum; mixes B per sample if that is faster (dense routing with a shared A)."""
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
        """Read from the module's dictionaries, which is ten times faster than attribute lookup."""
        try:
            p = self._parameters
            adapter = p["lora_A"], p["lora_B"], p["router_weight"], p["router_bias"]
            return *adapter, self._buffers["selection_bias"]
        except KeyError:  # pruned or parametrized
            return tuple(getattr(self, name) for name in TENSORS)

    def router_parameters(self) -> list[nn.Parameter]:
        """The router's parameters, for any kind of router."""
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
        idle = sum(sorted(c.ranks)[: c.num_experts - c.top_k])  # rows that a token cannot use
        widths = self.out_features + (0 if c.shared_a else self.in_features)
        alpha = f"{c.alpha:g}" if isinstance(c.alpha, float) else c.alpha
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" num_experts={c.num_experts}, top_k={c.top_k}, r={c.r}, alpha={alpha},"
            f" gate={c.gate}, shared_a={c.shared_a}, dropout={c.dropout:g},"
            f" parameters={adapter:,} ({adapter - idle * widths:,} per token)"
        )


class _ZeroGradients(torch.autograd.Function):
    """y, with a zero gradient for parameters that did not contribute to it."""

    @staticmethod
    def forward(ctx, y, *parameters):
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def with_zero_gradients(y: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
    """y; its backward gives each trainable parameter a zero gradient."""
    trained = [p for p in parameters if p is not None and p.requires_grad]
    return _ZeroGradients.apply(y, *trained) if trained and torch.is_grad_enabled() else y
