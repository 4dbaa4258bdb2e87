"""Presets over existing experts: MeteoRA, Mixture-of-LoRAs (MoA), X-LoRA.

With adapters=, PEFT LoRA adapters as in from_peft become frozen experts, and only the routers train.
Without it, the experts are new and trainable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import nn

from ..config import LoraMoeConfig
from ..from_peft import from_peft
from ..routers import HiddenRouter, SequenceRouter
from ..steering import freeze_experts, injected
from .experts import NO_LOSS


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Frozen experts from PEFT LoRA adapters, and the router over them; an argument for `inject`.

    Attributes:
        adapters: as in from_peft.
        top_k: as in LoraMoeConfig; None is all of them.
        fields: router fields of LoraMoeConfig.
    """

    adapters: tuple
    top_k: int | None
    fields: Mapping

    def into(self, model: nn.Module) -> nn.Module:
        """Add the adapters as frozen experts, and return the same model."""
        top_k = len(self.adapters) if self.top_k is None else self.top_k
        from_peft(model, self.adapters, top_k=top_k, router=self.fields)
        freeze_experts(model, range(len(self.adapters)))
        for layer in injected(model).values():
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
        return model


def meteora(
    num_experts=8,
    r=8,
    top_k=2,
    alpha=16.0,
    *,
    temperature=1.0,
    adapters: Iterable | None = None,
    target_modules=(),
    **fields,
) -> LoraMoeConfig | Adapters:
    """y = W0 x + sum over e in top-K of  g_e s_e B_e A_e x,   g = softmax of the picked logits / temperature.

    To train the routers with each sample's adapter as label:

        losses.router_loss(model, losses.label_loss, labels)

    Args:
        adapters: PEFT LoRA adapters that become frozen experts; they determine number, ranks, scales and
            modules.
    Source: Xu et al. 2024 (MeteoRA), arXiv 2405.13053, and its code.
    """
    router = NO_LOSS | {"temperature": temperature, "renormalize": True} | fields
    return _bank(num_experts, r, top_k, alpha, adapters, target_modules, router)


def moa(
    num_experts=8,
    r=8,
    alpha=16.0,
    *,
    by="mean",
    adapters: Iterable | None = None,
    target_modules=(),
    **fields,
) -> LoraMoeConfig | Adapters:
    """y = W0 x + s_e B_e A_e x,  e = argmax W x*:  one expert per sequence, by its mean or first token x*.

    The weight is 1, so only domain labels train the router:

        losses.router_loss(model, losses.label_loss, labels)          labels (B,), one expert per sequence

    Decoding with a cache reuses the prompt's routing.

    Args:
        by: "mean" or "first".
        adapters: as in meteora.
    Source: Feng et al. 2024 (Mixture-of-LoRAs), arXiv 2403.03432; the linear router on the mean
    is inferred.
    """
    router = NO_LOSS | {"router": SequenceRouter(by), "renormalize": True} | fields
    return _bank(num_experts, r, 1, alpha, adapters, target_modules, router)


def xlora(
    hidden_size: int,
    num_experts=8,
    r=8,
    top_k=None,
    alpha=16.0,
    *,
    temperature=1.0,
    adapters: Iterable | None = None,
    target_modules=(),
    **fields,
) -> LoraMoeConfig | Adapters:
    """y = W0 x + sum_e g_e s_e B_e A_e x,  g = softmax((W h + b) / temperature),  h the base's last state.

    After inject, call presets.two_passes(model), which runs the base before each forward.  This
    corresponds to PEFT's classifier of depth 1 with scalings per layer: each layer has its own W and b.
    Deeper classifiers, or one for all layers, are not supported.  Decoding with a cache is not supported:
    use generate(use_cache=False).

    Args:
        hidden_size: size of h, the model's hidden size.
        top_k: None is all; otherwise the other gates are zero, without renormalization.
        adapters: as in meteora.
    Source: Buehler and Buehler 2024 (X-LoRA), arXiv 2402.07148, and PEFT.
    """
    router = {"router": HiddenRouter(hidden_size), "temperature": temperature, "renormalize": False}
    router = NO_LOSS | router | fields
    return _bank(num_experts, r, top_k, alpha, adapters, target_modules, router)


def _bank(num_experts, r, top_k, alpha, adapters, target_modules, fields):
    if adapters is not None:
        return Adapters(tuple(adapters), top_k, fields)
    top_k = num_experts if top_k is None else top_k
    sizes = {"num_experts": num_experts, "r": r, "top_k": top_k, "alpha": alpha}
    return LoraMoeConfig(**sizes, target_modules=target_modules, **fields)
