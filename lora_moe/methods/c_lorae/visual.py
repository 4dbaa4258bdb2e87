"""GatedVisual: an adapter that adds image features to the blocks of a T5 encoder or a decoder.

    "attention"   h_i <- h_i + tanh(gate) * Attention(query: norm(h_i), keys and values: v_1 .. v_P)
    "addition"    h_i <- h_i + tanh(gate) * W mean_p v_p

The gate is initially zero, so the model is initially unchanged bit for bit.  An adapter runs in a hook before
its block: block and model keep their classes and parameter names, and an activation checkpoint around the
block recomputes the adapter too.

Letters: B samples, L tokens, P patches of an image, D the model's width, D_v the image features'.

The paper states that C-LoRAE uses visual adapters; which of the two forms it uses is inferred.
"""

from __future__ import annotations

import torch
from torch import nn

MODES = ("attention", "addition")


class GatedVisual(nn.Module):
    """h (B, L, D) -> h + tanh(gate) * f(h, images).

    Args:
        width: D.
        image_width: D_v.
        mode: "attention" or "addition".
        heads: number of attention heads.
        head_width: width of each head.
    Attributes:
        images: (B, P, D_v) for the following forwards, or None for text only; see set_images.
        mask: (B, P) bool, False for missing patches; None if there are none.
    Raises:
        ValueError: if an argument is invalid.
    """

    def __init__(self, width, image_width, mode="attention", heads=4, head_width=32):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        for name, value in (("width", width), ("image_width", image_width), ("heads", heads)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.mode, self.heads, self.image_width = mode, heads, image_width
        self.images: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.gate = nn.Parameter(torch.zeros(()))
        if mode == "addition":
            self.value = nn.Linear(image_width, width)
            return
        inner = heads * head_width
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(image_width, inner, bias=False)
        self.value = nn.Linear(image_width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.images is None:
            return h
        v = self._of(h, self.images).to(self.value.weight.dtype)  # (B, P, D_v)
        mask = None if self.mask is None else self._of(h, self.mask)  # (B, P)
        attends = self.mode == "attention"
        seen = self._attend(h.to(v.dtype), v, mask) if attends else self._mean(v, mask)
        return h + (torch.tanh(self.gate) * seen).to(h.dtype)

    def _attend(self, h, v, mask):
        projected = self.query(self.norm(h)), self.key(v), self.value(v)
        # (B, heads, L or P, head_width)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected)
        mask = None if mask is None else mask[:, None, None]
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(seen.transpose(1, 2).flatten(2))

    def _mean(self, v, mask):
        if mask is None:
            return self.value(v.mean(1, keepdim=True))
        weight = mask.to(v.dtype)[..., None]
        count = weight.sum(1, keepdim=True).clamp(min=1)
        return self.value((v * weight).sum(1, keepdim=True) / count)

    def _of(self, h, given):
        """Rows for the samples of h; with beams, one image applies to all beams of its sample."""
        have, rows = given.shape[0], h.shape[0]
        if rows % have:
            raise ValueError(
                f"images: expected {rows}, one per sample, or one per group of equally many beams,"
                f" got {have}"
            )
        return given if have == rows else given.repeat_interleave(rows // have, 0)

    def before(self, block, args, kwargs):
        """The hook, which passes the block's hidden states through the adapter."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self(kwargs["hidden_states"])}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters())

    def __getstate__(self):
        """For copies and pickles, without the last batch's images."""
        return self.__dict__ | {"images": None, "mask": None}


def add_visual(
    model: nn.Module,
    blocks: tuple[str, ...],
    image_width: int,
    *,
    width: int | None = None,
    **options,
) -> nn.Module:
    """Add a GatedVisual before each of the blocks, as its submodule `visual`.

    Args:
        model: a Hugging Face encoder, decoder or both.
        blocks: paths of transformer blocks: ("encoder.block.0", ...) for a T5, ("model.layers.20", ...)
            for a decoder.
        image_width: D_v.
        width: D; model.config.hidden_size by default.
        options: options of GatedVisual.
    Returns:
        The same model; its results do not change before set_images and training.
    Raises:
        ValueError: if a path is unknown or has an adapter; the model is unchanged.
    """
    known = dict(model.named_modules())
    unknown = [path for path in blocks if not path or path not in known]
    if unknown or not blocks:
        raise ValueError(f"blocks: expected paths of the model's blocks, got {unknown or blocks!r}")
    taken = [path for path in blocks if hasattr(known[path], "visual")]
    if taken:
        raise ValueError(f"blocks: expected blocks without a `visual`, got {taken}")
    width = model.config.hidden_size if width is None else width
    for path in blocks:
        block = known[path]
        like = next(block.parameters())
        block.visual = GatedVisual(width, image_width, **options).to(like.device)
        block.register_forward_pre_hook(block.visual.before, with_kwargs=True)
    return model


def set_images(
    model: nn.Module, images: torch.Tensor | None, mask: torch.Tensor | None = None
) -> None:
    """Set the images of the following forwards, until the next call.

    Args:
        model: a model with GatedVisual modules.
        images: (B, P, D_v), or None for text only.
        mask: (B, P) bool, at least one True per row.
    Raises:
        ValueError: if there are no such modules, or a shape is wrong.  Nothing changes then.
    """
    adapters = [m for m in model.modules() if isinstance(m, GatedVisual)]
    if not adapters:
        raise ValueError("model: expected one with GatedVisual modules (see add_visual), got none")
    D_v = adapters[0].image_width
    if images is not None and (images.dim() != 3 or images.shape[-1] != D_v or 0 in images.shape):
        raise ValueError(f"images: expected (B, P, {D_v}), got {tuple(images.shape)}")
    if mask is not None and (images is None or mask.shape != images.shape[:2]):
        raise ValueError(f"mask: expected (B, P) of images, got {tuple(mask.shape)}")
    for adapter in adapters:
        place = adapter.gate.device
        adapter.images = None if images is None else images.to(place)
        adapter.mask = None if mask is None else mask.to(place)
