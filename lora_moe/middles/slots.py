"""SlotMiddle: mixes tokens into slots, applies experts, and mixes slots into tokens (Omni-SMoLA)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .. import functional as F
from ..components import MAX_TASKS, count, register
from ..middle import Middle
from ..routing import Routing

MAX_SEGMENTS = 65_536


@register
@dataclasses.dataclass(frozen=True)
class SlotMiddle(Middle):
    """Z_e = sum_t softmax_t(logits)_te x_t,   y_t = base_t + sum_e softmax_e(logits)_te s_e B_e A_e Z_e.

    Both softmaxes use the token router's logits; each expert has one slot per segment of a sequence.  Slots
    exclude padding.  Not causal: tokens depend on later ones, so decoding with a cache raises.

    Args:
        segments: number of equal segments per sequence, each with its own slots.
    Source: Wu et al. 2023 (Omni-SMoLA), arXiv 2312.00968; one slot per expert and the definition of a
    segment are inferred.
    """

    kind: ClassVar[str] = "slots"
    segments: int = 1

    def __post_init__(self):
        count("segments", self.segments, MAX_SEGMENTS)

    def mix(self, x, base, routing, tensors, batch):
        if x.dim() != 3:
            raise ValueError(f"x: expected (B, L, D_in) for slots, got {tuple(x.shape)}")
        if routing.logits is None:
            raise ValueError("routing: expected the router's, as slots need its logits")
        if batch.cached:
            raise RuntimeError(
                "past_key_values: slots mix all tokens of a sequence, which is not causal and has no"
                " cache; pass use_cache=False"
            )
        (B, L, D_in), E, n = x.shape, routing.num_experts, self.segments
        if L % n:
            raise ValueError(f"segments: expected a divisor of the length {L}, got {n}")
        logits, enters = routing.logits, self.enters(x, routing, batch)  # (T, E)
        slots = _softmax(logits.view(B * n, L // n, E), enters.view(B * n, L // n, E), 1)
        back = _softmax(logits, self.returns(x, routing, batch), 1)  # (T, E)
        rows = x.reshape(B * n, L // n, D_in)
        Z = torch.einsum("ble,bld->bed", slots.to(x.dtype), rows)  # (B n, E, D_in)
        layer = batch.layer
        ids = torch.arange(E, device=x.device).repeat(B * n)
        out = F.grouped_lora(
            Z, layer.lora_A, layer.lora_B, Routing.from_ids(ids, num_experts=E),
            rank_offsets=layer.offsets, scaling=layer.scaling, shared_a=batch.config.shared_a,
            frozen=layer.frozen,
        )  # (B n, E, D_out)  # fmt: skip
        back = back.to(x.dtype).view(B * n, L // n, E)
        return base + torch.einsum("ble,bed->bld", back, out).reshape(base.shape)

    def enters(self, x, routing, batch) -> torch.Tensor:
        """(T, E): whether a token enters the slot of an expert."""
        mask = batch.mask(x)
        own = self.returns(x, routing, batch)
        return own if mask is None else own & mask[:, None].to(own.device)

    def returns(self, x, routing, batch) -> torch.Tensor:
        """(T, E): whether a token reads from the slot of an expert."""
        return torch.ones_like(routing.logits, dtype=torch.bool)


@register
@dataclasses.dataclass(frozen=True)
class ModalSlotMiddle(SlotMiddle):
    """SlotMiddle in which each expert uses the tokens of one modality, or of all.

    task_ids give each token's modality; a token of modality -1 uses only the experts for all modalities.

    Args:
        num_tasks: number of modalities.
        modalities: modality of each expert, (E,), in [-1, num_tasks); -1 is all.
    """

    kind: ClassVar[str] = "modal_slots"
    num_tasks: int = 1
    modalities: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        N = count("num_tasks", self.num_tasks, MAX_TASKS)
        if not isinstance(self.modalities, (tuple, list)) or not all(
            type(m) is int and -1 <= m < N for m in self.modalities
        ):
            raise ValueError(
                f"modalities: expected integers in [-1, {N}), got {self.modalities!r:.99}"
            )
        object.__setattr__(self, "modalities", tuple(self.modalities))

    def tensors(self, config, D_in, D_out):
        if len(self.modalities) != config.num_experts:
            raise ValueError(
                f"modalities: expected {config.num_experts}, one per expert, got {len(self.modalities)}"
            )
        return {}

    def returns(self, x, routing, batch):
        expert = torch.tensor(self.modalities, device=x.device)
        return (expert < 0) | (batch.tasks(x)[:, None] == expert)


def _softmax(logits, taken, dim):
    """Softmax over the selected entries; zeros if there are none."""
    p = torch.softmax(logits.masked_fill(~taken, -torch.inf), dim)
    return torch.where(taken.any(dim, keepdim=True), p, 0)
