"""BranchLoRA: continual instruction tuning by branches on a shared trunk (arXiv 2506.02041).

    y_i = W0 x_i + s * sum over j in topk(W_t x_*) of  g_j * B_j A x_i        for every token i of a sequence

A is the trunk, B_j the branches, W_t the router of task t.  A sequence decides once, by its token
x_*: the first that is not padding, or the mean of those tokens (or each token for itself).  While a
task is learned, its routed weight is counted branch by branch; afterwards the k most used branches
are frozen, and their gradient is not computed any more.  Keys beside the model (continual.TaskSelector)
tell which router a sequence without a task id wants.

    inject(model, branch_lora(...))
    for data in tasks:
        begin_task(model)             # a new router; make the optimizer after it
        train(model, data)
        end_task(model)               # freezes what the task came to rely on
    set_task(model, 2)                # or one task for each sequence

Letters: B sequences, L tokens each, E branches, r the rank of the trunk and of each branch.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..config import LoraMoeConfig
from ..inject import place
from ..targets import targets_of
from .branch_lora_layer import READS, BranchLoraLinear, Sequences


def branch_lora(num_branches=8, r=16, top_k=2, alpha=256.0, **fields) -> LoraMoeConfig:
    """The paper's layer: one A of rank r, E branches of rank r, s = alpha / (E r).

    alpha belongs to the total rank E r, as it does in moelora: with the paper's 256 and 128 both
    methods scale by 2.  More branches later leave the scaling alone.
    """
    losses = {"balance_coef": 0.0, "z_coef": 0.0}
    sizes = {"num_experts": num_branches, "r": r, "top_k": top_k, "alpha": alpha / num_branches}
    return LoraMoeConfig(**sizes, shared_a=True, **losses | fields)


def moelora(num_experts=8, r=128, alpha=256.0, **fields) -> LoraMoeConfig:
    """MoELoRA, the baseline: every token takes all E experts of rank r / E, softmax gates, s = alpha / r.

    Source: Chen et al. 2024 (CoIN), arXiv 2403.08350.
    """
    if r % num_experts:
        raise ValueError(f"r: expected a multiple of {num_experts} experts, got {r}")
    sizes = {"num_experts": num_experts, "r": r // num_experts, "top_k": num_experts}
    losses = {"balance_coef": 0.0, "z_coef": 0.0}
    return LoraMoeConfig(**sizes, alpha=alpha / num_experts, **losses | fields)


def inject(
    model: nn.Module,
    config: LoraMoeConfig,
    *,
    reads: str = "first",
    fixed_opening: bool = True,
    also: tuple[str, ...] = (),
) -> nn.Module:
    """Put a BranchLoraLinear in place of each module that config.target_modules names.

    Everything else is frozen, except `also`.  The model's attention_mask says which tokens are
    padding; in a causal model, tokens from the first one with a label on do not decide, since there
    are none when it answers.  During generation the prompt's decision stays.

    In a causal model the first token sees no other.  Where all sequences open alike, by a BOS token
    or a chat template, it says nothing about the sequence: the mean is read instead, with a warning.

    Args:
        model: a Hugging Face model, or any module whose forward takes attention_mask.
        config: see branch_lora().
        reads: "first", "mean" or "token": by what a sequence decides.
        fixed_opening: False if the sequences of a causal model differ in their first token.
        also: names of modules whose own parameters are trained and saved too (a projector).
    Returns:
        The same model; begin_task is next.
    Raises:
        ValueError: an argument does not fit, nothing matches, or the model has branches already.
    """
    if reads not in READS:
        raise ValueError(f"reads: expected one of {READS}, got {reads!r}")
    if any(isinstance(m, BranchLoraLinear) for m in model.modules()):
        raise ValueError("model: expected one without branches")
    causal = bool(getattr(model, "can_generate", bool)())
    if reads == "first" and causal and fixed_opening:
        reads = "mean"
        warnings.warn(
            "the first token of a causal model sees no other, and a fixed opening is always the"
            " same token: sequences decide by their mean (fixed_opening=False reads the first)",
            stacklevel=2,
        )
    sequences = Sequences(reads, causal, tuple(also))
    bases = dict.fromkeys(targets_of(model, config).values())
    return install(model, {base: BranchLoraLinear(base, config, sequences) for base in bases})


def install(model: nn.Module, layers: dict[nn.Module, BranchLoraLinear]) -> nn.Module:
    """Freeze what the model has, place the layers, and let them see the model's arguments."""
    sequences = next(iter(layers.values())).sequences
    trained = [model.get_submodule(name) for name in sequences.also]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    place(model, layers)
    model.register_forward_pre_hook(sequences.before_forward, with_kwargs=True)
    return model


def begin_task(model: nn.Module, *, router: bool = True) -> int:
    """Start to learn a task: each layer gets a router for it.  Make the optimizer afterwards.

    Args:
        model: see inject.
        router: False goes on with the router of the task before, if there is one.
    Returns:
        The task's number, 0 for the first.
    Raises:
        ValueError: a task is being learned already.
    """
    layers, sequences = parts(model)
    if sequences.learning:
        raise ValueError(f"begin_task: expected end_task for task {len(sequences.bank) - 1} first")
    for name, layer in layers.items():
        if router or not sequences.bank:
            layer.add_router()
        layer.routers[-1].requires_grad_(True)
        if len(layer.frozen) == len(layer.branches):
            warnings.warn(f"{name}: every branch is frozen; see add_branches", stacklevel=2)
    sequences.bank.append(len(layer.routers) - 1)
    sequences.learning, sequences.task = True, len(sequences.bank) - 1
    return sequences.task


def end_task(model: nn.Module, freeze: int | None = None) -> None:
    """Freeze in each layer the `freeze` branches that the task used most, and the task's router.

    A branch that an earlier task froze may be among them: then fewer become new.  What was learned
    stays; what a frozen branch adds can still change with the trunk, which every task trains.

    Args:
        model: see inject.
        freeze: how many; top_k of them by default, 0 for none.
    Raises:
        ValueError: no task is being learned, or freeze is negative.
    """
    layers, sequences = parts(model)
    if not sequences.learning:
        raise ValueError("end_task: expected begin_task first")
    if freeze is not None and (type(freeze) is not int or freeze < 0):
        raise ValueError(f"freeze: expected a number of branches, got {freeze!r}")
    for layer in layers.values():
        layer.freeze_most_used(layer.config.top_k if freeze is None else freeze)
        layer.routers.requires_grad_(False)
    sequences.learning = False


def add_branches(model: nn.Module, n: int) -> None:
    """n new branches in each layer for the tasks that begin from now on; outputs keep their bits.

    Raises:
        ValueError: n is no positive number, or the layers would exceed LoraMoeConfig's bounds.
    """
    layers, _ = parts(model)
    if type(n) is not int or n < 1:
        raise ValueError(f"n: expected a positive number of branches, got {n!r}")
    for layer in layers.values():  # the bounds of a configuration that had them from the start
        dataclasses.replace(layer.config, num_experts=len(layer.branches) + n, r=layer.rank)
    for layer in layers.values():
        layer.add_branches(n)


def set_task(model: nn.Module, task: int | Sequence[int] | torch.Tensor) -> None:
    """Whose router decides from now on: one task, or (B,) tasks, one for each sequence.

    Raises:
        ValueError: there is no such task.
    """
    _, sequences = parts(model)
    known = len(sequences.bank)
    tasks = torch.as_tensor(task)
    if tasks.is_floating_point() or tasks.dtype == torch.bool or tasks.dim() > 1:
        raise ValueError(f"task: expected a number or (B,) numbers, got {task!r}")
    if tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < known:
        raise ValueError(f"task: expected numbers in [0, {known}), got {tasks.tolist()}")
    sequences.task = tasks if tasks.dim() else int(tasks)


def set_mask(model: nn.Module, mask: torch.Tensor | None) -> None:
    """Say which tokens may decide, (B, L), in place of the model's arguments; None ends that.

    For a model that takes no two-dimensional attention_mask, or a loss outside of the model: the
    answer's tokens are not to decide.
    """
    _, sequences = parts(model)
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"mask: expected (B, L), got {tuple(mask.shape)}")
    sequences.given_mask = sequences.mask = None if mask is None else mask.bool()


def branch_layers(model: nn.Module) -> dict[str, BranchLoraLinear]:
    """The model's layers by their (first) path; empty if there are none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BranchLoraLinear)}


def parts(model):
    layers = branch_layers(model)
    if not layers:
        raise ValueError("model: expected one with branches (see inject), got none")
    return layers, next(iter(layers.values())).sequences
