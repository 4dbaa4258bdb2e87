"""Errors between two implementations: loss, dx and the gradients of all trained parameters.

    |ours - theirs| / max |theirs|       maximum over the entries of a tensor and the tensors of a model

x (B, L, D) is the input of a layer, or the embedded tokens of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from lora_moe import injected

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclasses.dataclass(frozen=True)
class Side:
    """One implementation.

    loss        loss(x), 0-dim
    gradients   gradients() after a backward: {name: gradient of each trained parameter}, in our shapes
    """

    loss: Callable[[torch.Tensor], torch.Tensor]
    gradients: Callable[[], dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both sides and x; bound None uses the bound of the dtype, otherwise `why` explains the larger one."""

    ours: Side
    theirs: Side
    x: torch.Tensor
    bound: float | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    dtype: str
    losses: tuple[float, float]
    loss: float
    dx: float
    gradients: float
    tensors: int  # how many have a gradient
    bound: float
    why: str

    @property
    def agrees(self) -> bool:
        return max(self.loss, self.dx, self.gradients) <= self.bound  # False for NaN


def compare(pair: Pair) -> Found:
    (loss, dx, own), (their_loss, their_dx, others) = (
        measured(side, pair.x) for side in (pair.ours, pair.theirs)
    )
    if own.keys() != others.keys():
        raise ValueError(f"gradients: ours of {sorted(own)}, theirs of {sorted(others)}")
    return Found(
        dtype=str(pair.x.dtype).removeprefix("torch."),
        losses=(loss.item(), their_loss.item()),
        loss=distance(loss, their_loss),
        dx=distance(dx, their_dx),
        gradients=max(distance(own[name], others[name], name) for name in own),
        tensors=len(own),
        bound=pair.bound or BOUNDS[pair.x.dtype],
        why=pair.why,
    )


def measured(side: Side, x: torch.Tensor):
    x = x.clone().requires_grad_()
    loss = side.loss(x)
    loss.backward()
    return loss.detach(), x.grad, side.gradients()


def distance(a: torch.Tensor, b: torch.Tensor, name="dx") -> float:
    if a.shape != b.shape or not b.any():
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"{name}: expected one shape and not all zero, got {shapes}, {b.any()}")
    return ((a - b).abs().max() / b.abs().max()).item()


# --- shared by the pairs ---------------------------------------------------------------------------


def fill(module: nn.Module, seed=1, std=0.5) -> nn.Module:
    """Fills all trained parameters with normal values, so that each affects the result."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std, generator=g)
    return module


def tokens(D: int, dtype=torch.float64) -> torch.Tensor:
    """Random input (2, 9, D)."""
    return torch.randn(2, 9, D, dtype=dtype, generator=torch.Generator().manual_seed(2))


def mean_square(layer: Callable) -> Callable:
    return lambda x: layer(x).square().mean()


def causal(model: nn.Module, ids: torch.Tensor) -> Callable:
    """Returns loss(x), the next-token cross entropy of embedded tokens; that of transformers is fp32."""

    def loss(x):
        logits = model(inputs_embeds=x).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    return loss


def gradients_of(model: nn.Module) -> Callable:
    """Returns a function that gives {path.name: gradient} for our layers in the model."""
    return lambda: {
        f"{path}.{name}": tensor.grad
        for path, layer in injected(model).items()
        for name, tensor in layer.adapter_state().items()
        if tensor.requires_grad and tensor.grad is not None
    }


def llama(seed=0):
    """A tiny fp64 decoder whose layers contribute noticeably to the residual stream.

    The norms of transformers round to fp32, which would hide or amplify small differences.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    for path, module in list(model.named_modules()):
        if path.endswith("norm"):
            model.set_submodule(path, nn.RMSNorm(16, module.variance_epsilon))
    return fill(model.double().eval(), std=0.3)


def embedded(model: nn.Module):
    """Random ids (2, 9) and their embeddings x (2, 9, D)."""
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    return ids, model.get_input_embeddings()(ids).detach()
