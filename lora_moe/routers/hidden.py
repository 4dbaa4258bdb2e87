"""HiddenRouter: reads hidden states from a first pass of the base model (X-LoRA)."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import ClassVar

import torch
from torch import nn

from ..components import TensorSpec, count, register
from ..recompute import recomputing
from ..reference import accumulator
from .base import Router, decide

MAX_WIDTH = 65_536


class _Thread(threading.local):
    def __init__(self):
        self.states = weakref.WeakKeyDictionary()  # layer -> (B, L, hidden) of the first pass


_thread = _Thread()
_last: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # for recomputation in other threads


def show(layers, states: torch.Tensor) -> None:
    """Set the states (B, L, hidden) that these layers' routers read in this thread's next forwards."""
    for layer in layers:
        _thread.states[layer] = _last[layer] = states


@register
@dataclasses.dataclass(frozen=True)
class HiddenRouter(Router):
    """top-k of gate((W h + b) / temperature),  with h the token's last hidden state in the base model.

    h comes from a first pass without experts and without gradients, which presets.two_passes(model)
    runs before each forward of the model.

    Args:
        hidden_size: size of h, the model's hidden size.
    Source: Buehler and Buehler 2024 (X-LoRA), arXiv 2402.07148, its classifier of depth 1 per layer.
    """

    kind: ClassVar[str] = "hidden"
    config_fields: ClassVar[tuple[str, ...]] = ("gate", "renormalize", "temperature")
    hidden_size: int

    def __post_init__(self):
        count("hidden_size", self.hidden_size, MAX_WIDTH)

    def tensors(self, config, D_in, D_out):
        E = config.num_experts
        return {
            "router_weight": TensorSpec((E, self.hidden_size)),
            "router_bias": TensorSpec((E,), nn.init.zeros_),
        }

    def route(self, x, tensors, batch):
        h = _thread.states.get(batch.layer)
        if h is None and recomputing():
            h = _last.get(batch.layer)
        if h is None:
            raise RuntimeError(
                "HiddenRouter: expected a first pass before the forward; call"
                " lora_moe.presets.two_passes(model) once, and run the whole model"
            )
        if h.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"x: expected the tokens of the first pass {tuple(h.shape[:-1])}, got"
                f" {tuple(x.shape[:-1])}"
            )
        weight = tensors["router_weight"]
        wide = torch.promote_types(weight.dtype, accumulator(h.dtype))
        logits = h.flatten(0, -2).to(wide) @ weight.to(wide).T + tensors["router_bias"].to(wide)
        return decide(logits, batch.config)
