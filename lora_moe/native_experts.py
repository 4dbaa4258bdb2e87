"""LoraMoeExperts: one LoRA per expert of a MoE model, routed by the model's own router.

    y_t = sum over slots j of  w_tj down_e(act(gate_up_e(x_t))),   e = ids_tj
    gate_up_e(x) = W_e x + b_e + s_e B_e A_e x,   down_e likewise

ids and w come from the model's router.  Slots are sorted by expert, as in transformers' "grouped_mm", and
the LoRAs run in functional.grouped_lora without computing W_e + s_e B_e A_e.

Letters: T tokens, K picked experts per token, S = T K slots, E experts, R = sum of their ranks.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from . import forward_records
from . import functional as F
from .config import LoraMoeConfig
from .context import fit_rows, told
from .fused import config_at, fused_names, tensor_names, why_unfit
from .grouped import SortTokens, Unsort, grouped_linear
from .placement import LoraMoeLayer
from .recompute import recomputing
from .routing import Routing
from .tokens import tokens_of


class LoraMoeExperts(LoraMoeLayer):
    """A drop-in replacement for `base`, the fused experts of a transformers MoE model.

    For each adapted weight P, gate_up_proj or down_proj, it has parameters lora_A_P (R, D_in) and lora_B_P
    (R, D_out), each with the rows of all experts.  Initial values and dtypes are as in LoraMoeLinear, so the
    initial output equals the base's.  base.forward runs only if adapters are disabled: otherwise, with any
    experts_implementation, products are grouped as with "grouped_mm", and equal to it bit for bit.

    Attributes: as in placement.LoraMoeLayer; config.target_parameters are the adapted weights.

    Args:
        base: a module with transformers' experts interface (see fused.py).
        config: LoraMoeConfig with target_parameters.
    Raises:
        TypeError: if base has no such experts, or is already a LoraMoeExperts.
        ValueError: if num_experts differs, or target_parameters matches none of base's weights.
    """

    selection_bias = None

    def __init__(self, base: nn.Module, config: LoraMoeConfig):
        if not isinstance(config, LoraMoeConfig):
            raise TypeError(f"config: expected a LoraMoeConfig, got {type(config).__name__}")
        if reason := why_unfit(base):
            raise TypeError(f"base: expected fused experts, but {reason}")
        config = config_at(base, config)
        super().__init__(base, config)
        self.names = tuple(n for name in config.target_parameters for n in tensor_names(name))
        self._begin()

    def pairs(self):
        for name in self.config.target_parameters:
            A, B = tensor_names(name)
            yield getattr(self, A), getattr(self, B)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """base(hidden_states, ids, weights) plus the LoRAs.

        Args:
            hidden_states: (T, D).
            ids, weights: (T, K), the router's decision, by position or by the base's argument names.
        Returns:
            (T, D) in hidden_states' dtype.
        """
        decision = told(self, hidden_states)
        if decision.disabled:
            return self.base_layer(hidden_states, *args, **kwargs)
        ids, weights = self._decided(args, kwargs) if kwargs else args
        if decision.routing is not None:
            ids, weights = _replayed(decision.routing, hidden_states, weights.dtype)
        tokens = tokens_of(hidden_states, decision)
        y, counts = self.mix(hidden_states, ids, weights)
        if not recomputing():
            forward_records.remember(self, Routing(ids.int(), weights.detach(), counts), tokens)
        return y

    def _decided(self, args, kwargs):
        names = list(inspect.signature(self.base_layer.forward).parameters)[1 + len(args) :]
        return *args, *(kwargs[name] for name in names)

    def mix(self, x, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
        """y (T, D) for a decision (T, K), and slots per expert (E,) int64; does not record the forward."""
        base, K, E = self.base_layer, ids.shape[-1], self.config.num_experts
        sorted_ids, order = torch.sort(ids.reshape(-1))  # (S,)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        experts = torch.arange(E, device=ids.device, dtype=sorted_ids.dtype)
        ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)  # (E,)
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        ones = torch.ones(order.shape[0], 1, device=x.device)
        slots = Routing(sorted_ids.int()[:, None], ones, counts)

        up, down = fused_names(base)
        h = SortTokens.apply(x, order, place, K)  # (S, D)
        h = self._linear(up, h, sorted_ids, ends, slots)
        h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        h = self._linear(down, h, sorted_ids, ends, slots)
        if getattr(base, "has_post_expert_norm", False):  # not in older versions
            h = base.post_expert_norm(h)
        h = Unsort.apply(h, order, place).unflatten(0, (-1, K))  # (T, K, D)
        return (h * weights[..., None]).sum(1).to(x.dtype), counts

    def _linear(self, name, x, ids, ends, slots):
        """One linear layer of all experts.  x (S, D_in) -> (S, D_out)"""
        base = self.base_layer
        weight = getattr(base, name)
        y = grouped_linear(x, weight if base.is_transposed else weight.transpose(-2, -1), ends)
        if base.has_bias:
            y = y + getattr(base, f"{name}_bias")[ids]
        if name not in self.config.target_parameters:
            return y
        A, B = (getattr(self, n) for n in tensor_names(name))
        x = self._dropped(x.to(y.dtype))
        with torch.autocast(x.device.type, enabled=False):  # y already has the base's dtype
            return F.grouped_lora(
                x, A, B, slots, rank_offsets=self.offsets, scaling=self._scaling_beside(B), base=y,
                frozen=self._frozen,
            )  # fmt: skip

    def extra_repr(self) -> str:
        c = self.config
        alpha = f"{c.alpha:g}" if isinstance(c.alpha, float) else c.alpha
        count = sum(t.numel() for t in self.adapter_state().values())
        return (
            f"target_parameters={c.target_parameters}, num_experts={c.num_experts}, r={c.r},"
            f" alpha={alpha}, dropout={c.dropout:g}, parameters={count:,}"
        )


def _replayed(routing, x, dtype):
    """ids and weights of a routing override; an empty slot becomes expert 0 with weight 0."""
    routing = fit_rows(routing, x)
    ids, E = routing.indices.long(), routing.num_experts
    if ids.is_cpu and not torch.compiler.is_compiling() and bool((ids >= E).any()):
        raise ValueError(f"routing: expected expert ids in [-1, {E}), got {int(ids.max())}")
    empty = (ids < 0) | (ids >= E)
    return torch.where(empty, 0, ids), torch.where(empty, 0, routing.weights).to(dtype)
