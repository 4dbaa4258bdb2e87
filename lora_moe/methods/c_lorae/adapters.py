"""Adds C-LoRAE's experts to a model, and sets the tasks of a batch.

Letters: B samples, N tasks.
"""

from __future__ import annotations

import torch
from torch import nn

from ...injection import inject as inject_experts
from ...layers import LoraMoeLinear
from ...routers import UniversalRouter
from ...steering import injected, set_routing
from .config import CLoraeConfig
from .information import Pooling
from .visual import GatedVisual


def CollaborativeLinear(base: nn.Module, config: CLoraeConfig) -> LoraMoeLinear:
    """A drop-in replacement for `base` that adds the universal expert and the sample's task expert.

        y = base(x) + g1(x) s_U B_U A_U x + g2(x) s_t B_t A_t x

    It is a LoraMoeLinear with a UniversalRouter: router_weight, the gate, is (2, D_in), or None without a
    gate, and task ids (set_tasks, use_routing) determine the expert in the second slot.
    """
    layer = LoraMoeLinear(base, config.mixture)
    if config.mutual_information:
        Pooling.attach(layer)
    return layer


def inject(model: nn.Module, config: CLoraeConfig, *, freeze: bool = True) -> nn.Module:
    """lora_moe.inject with config.mixture, plus what mutual_information_loss needs.

    Args, Returns, Raises: as in lora_moe.inject.  Parameters of the model's GatedVisual adapters stay
    trainable.
    """
    inject_experts(model, config.mixture, freeze=freeze)
    for layer in layers_of(model).values():
        if config.mutual_information and layer.config == config.mixture:
            Pooling.attach(layer)
    for adapter in (m for m in model.modules() if isinstance(m, GatedVisual)):
        adapter.requires_grad_(True)
    return model


def layers_of(model: nn.Module) -> dict[str, LoraMoeLinear]:
    """The model's layers with universal and task experts, by path."""
    layers = injected(model)
    return {n: m for n, m in layers.items() if isinstance(m.config.router, UniversalRouter)}


def set_tasks(model: nn.Module, task_ids: torch.Tensor | None) -> None:
    """Set the task of each sample in the following forwards: lora_moe.set_routing(model, task_ids).

    The recompute of an activation checkpoint and every step of generate() use it, for any lengths of
    encoder and decoder.  With beams, an id applies to all beams of its sample.

    Args:
        model: a model with C-LoRAE's experts.
        task_ids: (B,) integers in [-1, N), -1 for the universal expert only; None clears them.
    Raises:
        ValueError, TypeError: if there are no such experts or ids.  Nothing changes then.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError("model: expected one with C-LoRAE's experts (see c_lorae.inject)")
    if any(layer.config.num_tasks for layer in layers.values()):  # else only the universal expert
        set_routing(model, task_ids=task_ids)
