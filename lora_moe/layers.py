"""LoraMoeLinear: a frozen linear map plus a mixture of LoRA experts, in place of nn.Linear.

    y_t = W0 x_t + b + sum over e in topk(router(x_t)) of  g_te * (alpha / r_e) * B_e A_e x_t

Letters: T tokens (all leading dimensions of x together), E experts, R rank rows of all experts
together, r one expert's rank, D_in and D_out the linear's sizes.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from . import functional as F
from .config import LoraMoeConfig
from .reference import accumulator
from .routing import Routing

ROUTER_STD = 0.02
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LoraMoeLinear(nn.Module):
    """A drop-in for `base`: its own forward, plus the experts.

        y_t = base(x_t) + sum over e in topk(router(x_t)) of  g_te * (alpha / r_e) * B_e A_e x_t

    Parameters are lora_A (R, D_in), or (r, D_in) with shared_a; lora_B (R, D_out), whose row r
    pairs with row r of lora_A; router_weight (E, D_in).  A buffer selection_bias (E,) is there if
    the configuration asks for it.  Parameters have the dtype of base.weight, or fp32 where that is
    quantised; any later .to(dtype) works too: the router's products are full fp32 in each case.

    Initial values come from torch's default generator: lora_A uniform in +-1/sqrt(D_in) as in PEFT,
    lora_B zero, so that the layer starts as `base` bit for bit, router_weight normal with std 0.02.
    In a backward every parameter gets a gradient, zero for an expert that no token picked; only
    router_weight has none while the caller's routing stands in for it.

    Attributes:
        base_layer: the module that this one stands for; `weight` and `bias` are its own.
        routing: the Routing of the last forward, None before.  It carries that forward's graph, and
            keeps it alive until the next forward or set_routing replaces it: one step at most.
            An activation checkpoint's recompute leaves it alone; copies and pickles are without it.
        given: the caller's Routing in place of the router's, or None; see lora_moe.set_routing.
        frozen: ids of experts whose rows get an exactly zero gradient.

    Args:
        base: nn.Linear, or a module that behaves like one: it has in_features and out_features, is
            transformers' Conv1D, or has a two-dimensional weight (D_out, D_in).
        config: LoraMoeConfig; target_modules and exclude_modules do not matter here.
    Raises:
        TypeError: base is no linear module, or already a LoraMoeLinear.
    """

    def __init__(self, base: nn.Module, config: LoraMoeConfig):
        super().__init__()
        features = linear_features(base)
        if features is None or isinstance(base, LoraMoeLinear):
            raise TypeError(f"base: expected a linear module, got {type(base).__name__}")
        self.in_features, self.out_features = features
        self.config = config
        self.base_layer = base
        self.routing: Routing | None = None
        self.given: Routing | None = None
        self.frozen: tuple[int, ...] = ()
        self.offsets = F.rank_offsets_of(config.rank_offsets, config.num_experts)

        device = device_of(base)
        adapter = {
            name: torch.empty_like(t, device=device)
            for name, t in adapter_tensors(base, config).items()
        }
        self.lora_A = nn.Parameter(adapter["lora_A"])
        self.lora_B = nn.Parameter(adapter["lora_B"])
        self.router_weight = nn.Parameter(adapter["router_weight"])
        self.register_buffer("selection_bias", adapter.get("selection_bias"))
        self.register_buffer("scaling", None, persistent=False)
        self._restore_scaling()
        self.reset_parameters()
        self.train(base.training)

    @property
    def weight(self) -> torch.Tensor:
        """base_layer.weight: some models look at it (T5 reads its dtype)."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def reset_parameters(self) -> None:
        """Draw the initial values again (see the class)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.router_weight is not None:  # a method's layer may do without
            nn.init.normal_(self.router_weight, std=ROUTER_STD)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """base_layer(x, ...) plus the experts, in the base's dtype.  (..., D_in) -> (..., D_out)"""
        y = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"base_layer: expected a tensor from it, got {type(y).__name__}")
        if F.autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # the base has decided on y's dtype
                y, routing = self._add_experts(x.to(y.dtype), y)
        else:
            y, routing = self._add_experts(x if x.dtype == y.dtype else x.to(y.dtype), y)
        if not recomputing():
            self.routing = routing
        return y

    def _add_experts(self, x, base):
        config = self.config
        adapter = self.lora_A, self.lora_B
        dropout = config.dropout if self.training else 0.0
        if self.given is None and not dropout and not torch.is_grad_enabled():
            # a decoding model makes hundreds of these calls a token
            quick = F.routed_lora_at_once(
                x, self.router_weight, *adapter, config.top_k, self.offsets, self.scaling,
                config.shared_a, base, config.gate, config.renormalize, self.selection_bias,
            )  # fmt: skip
            if quick is not None:
                return quick
        router = {
            "gate": config.gate,
            "renormalize": config.renormalize,
            "bias": self.selection_bias,
        }
        experts = {
            "rank_offsets": self.offsets,
            "scaling": self.scaling,
            "shared_a": config.shared_a,
            "base": base,
            "frozen": self.frozen,
        }
        if self.given is None and not dropout:
            return F.routed_lora(x, self.router_weight, *adapter, config.top_k, **router, **experts)
        if self.given is None:
            routing = F.router_topk(x, self.router_weight, config.top_k, **router)
        else:
            routing = _fit(self.given, x)
        if dropout:
            x = nn.functional.dropout(x, dropout)
        return F.grouped_lora(x, *adapter, routing, **experts), routing

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter without its base: the parameters, and selection_bias where there is one."""
        buffers = {} if self.selection_bias is None else {"selection_bias": self.selection_bias}
        return dict(self.named_parameters(recurse=False)) | buffers

    def extra_repr(self) -> str:
        c = self.config
        adapter = sum(p.numel() for p in self.parameters(recurse=False))
        idle = sum(sorted(c.ranks)[: c.num_experts - c.top_k])  # rows that no token can be using
        widths = self.out_features + (0 if c.shared_a else self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" num_experts={c.num_experts}, top_k={c.top_k}, r={c.r}, alpha={c.alpha:g},"
            f" gate={c.gate}, shared_a={c.shared_a}, dropout={c.dropout:g},"
            f" parameters={adapter:,} ({adapter - idle * widths:,} a token)"
        )

    def _restore_scaling(self):
        """alpha / r, rounded once: .half() must not round it again, nor .to_empty() lose it."""
        values = [self.config.alpha / r for r in self.config.ranks]
        dtype = accumulator(self.lora_B.dtype)
        self.scaling = torch.tensor(values, dtype=dtype, device=self.lora_B.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._restore_scaling()
        return self

    def __getstate__(self):
        """For copies and pickles: the last forward's graph stays behind."""
        given = self.given and Routing(*(t if t is None else t.detach() for t in self.given))
        return self.__dict__ | {"routing": None, "given": given}


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(D_in, D_out) of a module that behaves like nn.Linear, None for any other."""
    D_in, D_out = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if isinstance(D_in, int) and isinstance(D_out, int):
        return (D_in, D_out) if D_in > 0 and D_out > 0 else None  # a lazy one does not know yet
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or getattr(weight, "ndim", 0) != 2:
        return None
    D_out, D_in = weight.shape
    transposed = getattr(module, "nf", None) == D_in  # transformers' Conv1D
    return (D_out, D_in) if transposed else (D_in, D_out)


def adapter_tensors(base: nn.Module, config: LoraMoeConfig) -> dict[str, torch.Tensor]:
    """Shapes and dtypes, as tensors without memory, of what a LoraMoeLinear adds to `base`."""
    D_in, D_out = linear_features(base)
    E, R = config.num_experts, sum(config.ranks)
    dtype = getattr(getattr(base, "weight", None), "dtype", None)
    dtype = dtype if dtype in _ADAPTER_DTYPES else torch.float32  # quantised
    shapes = {
        "lora_A": (config.ranks[0] if config.shared_a else R, D_in),
        "lora_B": (R, D_out),
        "router_weight": (E, D_in),
    }
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()
    }
    if config.selection_bias:  # moves in steps that bf16 cannot hold
        tensors["selection_bias"] = torch.empty(E, dtype=accumulator(dtype), device="meta")
    return tensors


def device_of(base):
    tensors = itertools.chain(base.parameters(), base.buffers())
    return next((t.device for t in tensors), torch.get_default_device())


def recomputing():
    """Inside a backward pass: an activation checkpoint runs the forward again.

    What it would leave in `routing` says nothing new and would keep the new activations alive.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _fit(routing, x):
    """The caller's routing for x's tokens: as it is, or one decision for each sample's tokens."""
    tokens, rows = math.prod(x.shape[:-1]), routing.indices.shape[0]
    if rows == tokens:
        return routing
    if rows != x.shape[0]:
        raise ValueError(
            f"routing: expected {tokens} rows, one per token, or {x.shape[0]}, one per sample,"
            f" for x {tuple(x.shape)}, got {rows}; see lora_moe.set_routing"
        )
    return routing.repeat(tokens // rows)
