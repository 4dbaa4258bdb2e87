"""A tiny Llama with experts, its batches, and the steps of one process as the reference for all comparisons.

The experts have 1 + 2 + 2 rank rows, which is not divisible by the number of processes: shards are uneven.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_moe import LoraMoeConfig, aux_loss, inject, injected, use_routing

EXPERTS = {"num_experts": 3, "r": (1, 2, 2), "top_k": 2, "alpha": 4.0, "balance_coef": 0.5}
TARGETS = ("q_proj", "v_proj", "down_proj")


def base(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def model(dtype=torch.float32, seed=1, **fields):
    """A tiny Llama whose experts have a nonzero B, so that they affect the output and all gradients."""
    adapted = inject(base(dtype), LoraMoeConfig(**EXPERTS | {"target_modules": TARGETS} | fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in injected(adapted).values():
            layer.lora_B.normal_(std=0.3)
            layer.router_weight.normal_()
    return adapted.train()


def batch(index: int) -> dict:
    """A batch of two rows of five tokens, one of them padded."""
    ids = torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(100 + index))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def task_ids(index: int) -> torch.Tensor:
    return torch.tensor([index % 3, -1])


def loss_of(wrapped, adapted, index: int, tasks: bool = False) -> torch.Tensor:
    """The loss of batch `index`, with the auxiliary loss, or with task ids if `tasks`."""
    if tasks:
        with use_routing(adapted, task_ids=task_ids(index)):
            return wrapped(**batch(index)).loss
    return wrapped(**batch(index)).loss + aux_loss(adapted)


def trained(adapted) -> dict:
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def adamw(adapted, **options):
    parameters = list(trained(adapted).values())
    return torch.optim.AdamW(parameters, **{"lr": 0.05, "weight_decay": 0.1} | options)


def one_process(adapted, optimizer, steps: int = 3, ranks: int = 2, tasks: bool = False):
    """[(losses of the micro-batches, gradients)] per step; gradients are accumulated from halved losses."""
    history = []
    for step in range(steps):
        losses = []
        for rank in range(ranks):
            loss = loss_of(adapted, adapted, step * ranks + rank, tasks)
            (loss / ranks).backward()
            losses.append(loss.detach())
        history.append((losses, {n: p.grad.clone() for n, p in trained(adapted).items()}))
        optimizer.step()
        optimizer.zero_grad()
    return history


def full(tensor):
    """The full tensor, of which this process may hold a shard."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def expect_equal(ours: dict, theirs: dict, what: str, tolerance: float = 0.0):
    """The same names and values; with a tolerance, relative to each tensor's norm."""
    assert ours.keys() == theirs.keys(), f"{what}: {ours.keys() ^ theirs.keys()}"
    for name, a in ours.items():
        a, b = full(a), full(theirs[name])
        assert a.shape == b.shape, f"{what}, {name}: {a.shape} against {b.shape}"
        if tolerance:
            error = float((a - b).norm() / b.norm().clamp(min=1e-12))
            assert error <= tolerance, f"{what}, {name}: {error:.2e}"
        else:
            assert torch.equal(a, b), f"{what}, {name}: {float((a - b).abs().max()):.2e} apart"
