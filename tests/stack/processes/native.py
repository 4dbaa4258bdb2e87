"""LoRAs on a model's own experts under FSDP2 and DDP: the same results as one process, saved and loaded."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from lora_moe import load_adapter, save_adapter

from ...support.models import moes


def gradients(model):
    tokens = moes.TOKENS
    model(tokens, labels=tokens).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check_fsdp2(place):
    model = moes.ours("GptOss").train()
    expected = gradients(copy.deepcopy(model))
    bare = moes.base_of(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits = model(moes.TOKENS).logits.detach()
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    found = gradients(model)
    assert len(found) == 8
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name])
    save_adapter(model, place)
    assert torch.equal(load_adapter(bare.train(), place)(moes.TOKENS).logits, logits)


def check_ddp(place):
    """An expert without tokens gets a zero gradient, so that DDP misses no parameter."""
    model = moes.ours().train()
    expected = gradients(copy.deepcopy(model))
    ddp = DDP(model)
    for _ in range(2):  # the second forward would find an unfinished reduction
        model.zero_grad()
        found = gradients(ddp)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("module.")])
