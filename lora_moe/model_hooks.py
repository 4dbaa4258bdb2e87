"""Hooks around each call of a model: its masks, labels and cache, and whether the batch fits task ids."""

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
    """A forward pre-hook that notes the masks of a call, and refuses a batch that task ids do not fit.

    `watch` is the whole model's, None for a model, an encoder or a decoder inside.  `layers` are kept: a
    forward must not look through all modules for them.
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
        past = given.get("past_key_values")  # asked now: layers of this call will fill it
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
        """Of the tokens that this model reads: its own, not that of a model around it.

        Around it stands the mask that a model has made into a dict, or expanded, for the one inside.
        """
        if (
            "decoder_attention_mask" in self.names
        ):  # attention_mask is the encoder's, with its own hook
            return given.get("decoder_attention_mask")
        mask = given.get("attention_mask")
        plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() <= 2)
        return mask if plain or not thread.calls else thread.calls[-1].mask

    def labels_of(self, given):
        """Of a causal model, whose labels are its own tokens: what its loss asks for.

        All that an encoder-decoder's decoder reads is an answer.
        """
        if self.decodes:
            ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
            return torch.zeros_like(ids) if ids is not None else _no_labels(embeds)
        if self.causal:
            return given.get("labels")
        return thread.calls[-1].labels if thread.calls and not self.names_labels else None

    def forget(self):
        """Take back this call and those inside, also ones that a KeyboardInterrupt left behind."""
        for i, call in enumerate(thread.calls):
            if call.hook is self:
                del thread.calls[i:]
                break


class AfterCall:
    """A forward hook that takes the call back, also where the forward raised."""

    def __init__(self, before: BeforeCall):
        self.before = before

    def __call__(self, model, args, output):
        if thread.calls and thread.calls[-1].hook is self.before:
            thread.calls.pop()
        elif not torch.compiler.is_compiling():
            self.before.forget()


def expect_rows(model, args, given, layers):
    """Inside generate rows expand; elsewhere another number of samples is a mistake."""
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
    if x is None or len(rows) != 1:  # a routing of its own for each layer is checked there
        return
    (rows,), samples = rows, x.shape[0]
    tokens = math.prod(x.shape[:2]) if x.dim() <= 3 else rows  # of pixels nobody knows how many
    if rows < samples or rows not in (samples, tokens):
        raise ValueError(
            f"task_ids: expected {samples}, one per sample of the batch {tuple(x.shape)}, got {rows}"
            " (see lora_moe.use_routing; beams are told apart inside the generate of the model that inject"
            " was called with)"
        )


def _no_labels(embeds):
    return None if embeds is None else torch.zeros_like(embeds[..., 0], dtype=torch.long)


def _decided(layer, told):
    """What the caller said of the layer's samples: experts, or tasks."""
    said = (told.routing, layer.routing_override, told.tasks, layer.tasks)
    return next((s for s in said if s is not None), None)


def _arguments(module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()
