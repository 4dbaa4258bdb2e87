"""LoraMoeMLP: replaces an FFN by the frozen FFN plus LoRA experts with a shared routing decision.

    y_t = sum over e in topk(router(x_t)) of  g_te FFN_e(x_t)

FFN_e is the FFN with s_e B_e A_e added to its linear layers.  The frozen layers run once per token: those
that read x, because all slots share x; the last one, because it is linear,

    down(h) = sum_j g_tj W h_tj = W (sum_j g_tj h_tj)

Letters: T tokens (all leading dimensions of x together), K picked experts per token, E experts, R rank rows
of all experts together, D the width of x, F of the hidden states.
"""

from __future__ import annotations

import torch
from torch import nn

from . import forward_records
from . import functional as F
from .checks import autocast_enabled
from .components import Batch, TensorSpec
from .config import LoraMoeConfig
from .context import fit_rows, thread, told
from .layers import with_zero_gradients
from .linear import ffn_width, linears_of
from .mix import mix
from .placement import LoraMoeLayer
from .recompute import recomputing
from .routers import TokenRouter
from .routing import Routing
from .tensors import component_specs
from .tokens import tokens_of


class LoraMoeMLP(LoraMoeLayer):
    """A drop-in replacement for an FFN `base`, with MixLoRA's experts.

        y_t = sum over e in topk(router(x_t)) of  g_te FFN_e(x_t)

    The FFN's own forward runs, with hooks on its linear layers.  Between them, hidden states have one more
    dimension, (..., K, F), so only elementwise functions are supported.  A token without experts gets the
    FFN's output bit for bit; while lora_B is zero, every token does, up to the rounding of sum_j g_tj.
    A bias of the last layer is multiplied by sum_j g_tj, as in sum_j g_tj FFN_j(x).

    Parameters are lora_A_<name> (R, D_in) and lora_B_<name> (R, D_out) for each adapted linear layer, and
    those of the router, which reads x.  Initial values and dtypes are as in LoraMoeLinear.

    Attributes: as in placement.LoraMoeLayer; config.target_modules are the names of the adapted layers.

    Args:
        base: a module whose direct children include linear layers D -> F or 2 F, and one F -> D.
        config: LoraMoeConfig with placement="ffn"; target_modules are names of base's children.
    Raises:
        TypeError: if base is not an FFN, or is already a LoraMoeMLP.
        ValueError: if config names a child that is not a linear layer.
    Source: MixLoRA, arXiv 2404.15159, which runs the last layer once per expert.
    """

    def __init__(self, base: nn.Module, config: LoraMoeConfig):
        width = None if isinstance(base, LoraMoeLayer) else ffn_width(base)
        if width is None:
            raise TypeError(f"base: expected an FFN (see linear.py), got {type(base).__name__}")
        if not isinstance(config, LoraMoeConfig):
            raise TypeError(f"config: expected a LoraMoeConfig, got {type(config).__name__}")
        known = linears_of(base)
        names = config.target_modules
        if not names or isinstance(names, str) or len(known.keys() & set(names)) != len(names):
            raise ValueError(
                f"target_modules: expected names from {sorted(known)}, got {names!r:.99}"
            )
        super().__init__(base, config)
        self.width = width
        self.router = config.router or TokenRouter()
        self.own = tuple(self.router.tensors(config, width, width))
        self.components = None if config.router is None else (self.router, self.own, None, ())
        adapted = (f"lora_{x}_{name}" for name in config.target_modules for x in "AB")
        self.names = (*adapted, *self.own)
        self._begin()
        for name in known:
            module = base.get_submodule(name)
            module.register_forward_pre_hook(Before(self, name))
            module.register_forward_hook(After(self, name))

    def pairs(self):
        for name in self.config.target_modules:
            yield self.pair(name)

    def pair(self, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """lora_A and lora_B of one of the FFN's linear layers, (None, None) if it is not adapted."""
        return getattr(self, f"lora_A_{name}", None), getattr(self, f"lora_B_{name}", None)

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that the router requires, by name."""
        return component_specs(self.config, self.width, self.width)

    def router_parameters(self):
        return [p for name in self.own if isinstance(p := getattr(self, name), nn.Parameter)]

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The FFN's forward with adapted linear layers.  (..., D) -> (..., D)"""
        decision = told(self, x)
        if decision.disabled:
            return self.base_layer(x, *args, **kwargs)
        tokens = tokens_of(x, decision)
        routing = self._route(x, decision)
        now = Pass(x.shape[:-1], routing, may_be_empty(self.config, decision))
        thread.passes[self] = now
        try:
            y = self.base_layer(x, *args, **kwargs)
        finally:
            del thread.passes[self]
        now.expect_done(self.config.target_modules, y)
        if not recomputing():
            forward_records.remember(self, routing, tokens)
        if decision.routing is None and self.components is None:
            return y
        return with_zero_gradients(
            y, *self.router_parameters()
        )  # router parameters get a gradient even if overridden

    def _route(self, x, decision):
        if decision.routing is not None:
            return fit_rows(decision.routing, x)
        tensors, device = {name: getattr(self, name) for name in self.own}, x.device.type
        if not autocast_enabled(device):
            return self.router.route(x, tensors, Batch(self, decision))
        with torch.autocast(device, enabled=False):  # as for the router of a linear layer
            x = x.to(torch.get_autocast_dtype(device))
            return self.router.route(x, tensors, Batch(self, decision))

    def adapt(
        self, name: str, x: torch.Tensor, y: torch.Tensor, routing: Routing, slots: str | None
    ):
        """y, the frozen layer's output for x, plus its experts'."""
        A, B = self.pair(name)
        if A is None:
            return y
        with torch.autocast(y.device.type, enabled=False):  # y already has the base's dtype
            x = self._dropped(x.to(y.dtype))
            return F.grouped_lora(
                x, A, B, routing, rank_offsets=self.offsets, scaling=self._scaling_beside(B), base=y,
                shared_a=self.config.shared_a, frozen=self._frozen, slots=slots,
            )  # fmt: skip

    def release(self) -> None:
        """Remove the hooks from base_layer."""
        for module in self.base_layer.children():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, h in hooks.items() if getattr(h, "layer", None) is self]:
                    del hooks[key]

    def __getattr__(self, name):
        """Some models read an FFN's linear layers, so mlp.down_proj returns base_layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            inner = modules["base_layer"]._modules if "base_layer" in modules else {}
            if name in inner:
                return inner[name]
            raise

    def extra_repr(self) -> str:
        c = self.config
        count = sum(t.numel() for t in self.adapter_state().values())
        return (
            f"target_modules={c.target_modules}, num_experts={c.num_experts}, top_k={c.top_k}, r={c.r},"
            f" gate={c.gate}, dropout={c.dropout:g}, parameters={count:,}"
        )


class Pass:
    """One forward of an FFN, with the routing that its linear layers share.

    Attributes:
        routing: of the T tokens.
        alone: the same with weights 1, since hidden states are mixed after the nonlinearity.
        weights: (..., K), mixing weights; a token without experts has weight 1 in slot 0, the plain FFN.
        hidden: (..., K, F), the input of the last layer while that runs.
        calls: {name: number of calls so far}.
    """

    def __init__(self, leading: torch.Size, routing: Routing, may_be_empty: bool):
        self.leading, self.routing = leading, routing
        self.alone = routing._replace(weights=torch.ones_like(routing.weights, requires_grad=False))
        weights = routing.weights
        if may_be_empty:
            ids = routing.indices
            taken = (ids >= 0) & (ids < routing.num_experts)
            first = torch.zeros_like(weights, requires_grad=False)
            first[:, :1] = ~taken.any(1, keepdim=True)
            weights = torch.where(taken, weights, 0) + first
        self.weights = weights.view(*leading, -1)
        self.hidden: torch.Tensor | None = None
        self.calls: dict[str, int] = {}
        self.mixed = 0

    def expect_done(self, names, y):
        wrong = {name: self.calls.get(name, 0) for name in names if self.calls.get(name) != 1}
        if wrong:
            self.refuse(f"calls {wrong}")
        if self.mixed != 1 or y.shape[:-1] != self.leading:
            self.refuse(f"{self.mixed} calls with hidden states and an output {tuple(y.shape)}")

    def refuse(self, got):
        raise RuntimeError(
            "LoraMoeMLP: expected an FFN whose forward calls each linear layer once, with elementwise"
            f" functions between them, got {got}; use placement='linear' for these layers"
        )


class Hook:
    """Base class of the hooks on an FFN's linear layers."""

    def __init__(self, layer: LoraMoeMLP, name: str):
        self.layer, self.name = layer, name


class Before(Hook):
    """Forward pre-hook; before the last layer it mixes the hidden states of a token's experts."""

    def __call__(self, module, args):
        now = thread.passes.get(self.layer)
        if now is None:
            return None
        x, *rest = args
        now.calls[self.name] = now.calls.get(self.name, 0) + 1
        if x.shape[:-1] == now.leading:
            return None
        if x.shape[:-2] != now.leading:
            now.refuse(f"an input {tuple(x.shape)} of {self.name}")
        mixed, now.hidden = mix(x, now.weights)
        now.mixed += 1
        return mixed, *rest


class After(Hook):
    """Forward hook that adds the experts: per slot in layers that read x, summed in the last layer."""

    def __call__(self, module, args, y):
        now = thread.passes.get(self.layer)
        if now is None:
            return None
        hidden, now.hidden = now.hidden, None
        if hidden is None:
            adapted = self.layer.adapt(self.name, args[0], y, now.alone, "apart")
            return adapted if adapted is not y else y.unsqueeze(-2)
        bias = getattr(module, "bias", None)
        if bias is not None:  # y includes it once
            more = now.weights.sum(-1, keepdim=True) - 1
            y = y + (more * bias).to(y.dtype)
        if hidden.shape[-2] == now.weights.shape[-1]:
            return self.layer.adapt(self.name, hidden, y, now.routing, "sum")
        return self.layer.adapt(self.name, hidden.squeeze(-2), y, now.routing, None)


def may_be_empty(config: LoraMoeConfig, decision) -> bool:
    """Whether a token may have no experts."""
    given = decision.routing is not None or config.router is not None
    return given or config.threshold is not None
