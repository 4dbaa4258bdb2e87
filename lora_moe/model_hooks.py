"""Hooks that record each model call's masks, labels and cache, and check the batch against task ids."""

from __future__ import annotations

import inspect
import math

import torch
from torch import nn

from .context import NOTHING, Call, thread
from .placement import LoraMoeLayer
from .routing import Routing
from .usage_warnings import Watch


class BeforeCall:
    """Forward pre-hook that records a call's masks, and raises if the batch does not match the task ids.

    `watch` is None for inner models, encoders and decoders.  `layers` is stored so that a forward need not
    search all modules for them.
    """

    def __init__(self, caller: nn.Module, watch: Watch | None, decodes: bool = False):
        self.names, self.watch = _arguments(caller), watch
        self.decodes = decodes
        self.names_labels = "labels" in self.names
        generates = getattr(caller, "can_generate", bool)()
        self.causal = generates and not getattr(caller.config, "is_encoder_decoder", False)
        self.layers = [m for m in caller.modules() if isinstance(m, LoraMoeLayer)]
        self.components = any(m.components is not None for m in self.layers)

    def __call__(self, model, args, kwargs):
        given = dict(zip(self.names, args)) | kwargs
        encoder = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if not torch.compiler.is_compiling():
            self.forget()
        outermost = not thread.calls
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        past = given.get("past_key_values")  # read now, before this call's layers fill it
        cached = (
            self.components and hasattr(past, "get_seq_length") and int(past.get_seq_length()) > 0
        )
        mask, labels = self.mask_of(given), self.labels_of(given)
        thread.calls.append(Call(self, mask, *encoder, tokens, labels, past, cached))
        if outermost and not torch.compiler.is_compiling():
            expect_rows(model, args, given, self.layers)
            if self.watch is not None:
                self.watch.begin(model)

    def mask_of(self, given):
        """The mask of the tokens that this model reads.

        If an outer model has expanded the mask or turned it into a dict, the outer model's is used.
        """
        if (
            "decoder_attention_mask" in self.names
        ):  # attention_mask is the encoder's, which has its own hook
            return given.get("decoder_attention_mask")
        mask = given.get("attention_mask")
        plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() <= 2)
        return mask if plain or not thread.calls else thread.calls[-1].mask

    def labels_of(self, given):
        """The labels of a causal model, which mark the answer among its tokens.

        In the decoder of an encoder-decoder model, all tokens belong to the answer.
        """
        if self.decodes:
            ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
            return torch.zeros_like(ids) if ids is not None else _no_labels(embeds)
        if self.causal:
            return given.get("labels")
        return thread.calls[-1].labels if thread.calls and not self.names_labels else None

    def forget(self):
        """Remove this call and inner ones, including those left over from a KeyboardInterrupt."""
        for i, call in enumerate(thread.calls):
            if call.hook is self:
                del thread.calls[i:]
                break


class AfterCall:
    """Forward hook that removes the call, even if the forward raised."""

    def __init__(self, before: BeforeCall):
        self.before = before

    def __call__(self, model, args, output):
        if thread.calls and thread.calls[-1].hook is self.before:
            thread.calls.pop()
        elif not torch.compiler.is_compiling():
            self.before.forget()


def expect_rows(model, args, given, layers):
    """Raise if the number of rows does not match the batch; generate may expand rows."""
    if thread.generating:
        return
    told = thread.decisions
    decisions = (_decided(m, told.get(m, NOTHING)) for m in layers if m.active)
    rows = {told.indices.shape[0] for told in decisions if isinstance(told, Routing)}
    if not rows:
        return
    main = given.get(getattr(model, "main_input_name", ""))
    tensors = [main, *args, *given.values()]
    x = next((t for t in tensors if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
    if x is None or len(rows) != 1:  # different routings per layer are checked in the layers
        return
    (rows,), samples = rows, x.shape[0]
    tokens = math.prod(x.shape[:2]) if x.dim() <= 3 else rows  # unknown for pixels
    if rows < samples or rows not in (samples, tokens):
        raise ValueError(
            f"task_ids: expected {samples}, one per sample of the batch {tuple(x.shape)}, got {rows}"
            " (see lora_moe.use_routing; beams are supported in the generate method of the model that was"
            " passed to inject)"
        )


def _no_labels(embeds):
    return None if embeds is None else torch.zeros_like(embeds[..., 0], dtype=torch.long)


def _decided(layer, told):
    """The caller's routing or tasks for the layer, or None."""
    said = (told.routing, layer.routing_override, told.tasks, layer.tasks)
    return next((s for s in said if s is not None), None)


def _arguments(module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()
