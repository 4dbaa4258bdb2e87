"""freeze_experts under FSDP2: frozen rows stay bitwise unchanged, all others equal those of one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_moe import freeze_experts, injected, load_adapter, save_adapter

from . import tiny
from .training import shard

OPTIMIZERS = {
    "foreach": lambda m: tiny.adamw(m, foreach=True),
    "fused": lambda m: tiny.adamw(m, fused=True),
    "sgd": lambda m: torch.optim.SGD(
        tiny.trained(m).values(), lr=0.1, momentum=0.9, weight_decay=0.1
    ),
}
FROZEN = [0, 2]  # rows 0 and 3, 4 of 5: on both sides of the shard boundary


def rows(adapted) -> dict:
    """{name: rows of the frozen experts}."""
    return {
        f"{path}.{name}": tiny.full(getattr(layer, name))[[0, 3, 4]]
        for path, layer in injected(adapted).items()
        for name in ("lora_A", "lora_B")
    }


def moved(adapted, optimizer, steps, wrapped=None):
    for step in steps:
        tiny.loss_of(wrapped or adapted, adapted, 2 * step + dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()


def expect_still(wrap, make):
    """Frozen rows stay unchanged even if the optimizer has momentum from before they were frozen."""
    adapted, whole = wrap(tiny.model()), tiny.model()
    optimizer, reference = make(adapted), make(whole)
    moved(adapted, optimizer, [0])
    tiny.one_process(whole, reference, 1)
    for model in (adapted, whole):
        freeze_experts(model, FROZEN)
    before, rest = rows(adapted), rows(whole)
    moved(adapted, optimizer, [0, 1, 2])
    tiny.one_process(whole, reference, 3)
    tiny.expect_equal(rows(adapted), before, "frozen rows")
    tiny.expect_equal(rows(whole), rest, "frozen rows of one process")
    tiny.expect_equal(tiny.trained(adapted), tiny.trained(whole), "weights")
    freeze_experts(adapted, None)
    moved(adapted, optimizer, [0])
    after = rows(adapted)
    assert not any(torch.equal(after[name], before[name]) for name in after), "unfrozen rows change"


def check_every_optimizer(place):
    for make in OPTIMIZERS.values():
        expect_still(shard, make)


def check_frozen_before_sharding(place):
    adapted = tiny.model()
    freeze_experts(adapted, FROZEN)
    before = rows(adapted)
    shard(adapted)
    moved(adapted, tiny.adamw(adapted), [0, 1])
    tiny.expect_equal(rows(adapted), before, "frozen rows")


def check_other_layouts(place):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    expect_still(lambda m: fully_shard(m, mesh=mesh), OPTIMIZERS["foreach"])

    def by_columns(parameter):
        from torch.distributed.tensor import Shard

        return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % 2 == 0 else None

    expect_still(lambda m: shard(m, shard_placement_fn=by_columns), OPTIMIZERS["foreach"])


def check_saved_and_restored(place):
    adapted = shard(tiny.model())
    freeze_experts(adapted, FROZEN)
    save_adapter(adapted, place)
    other = shard(tiny.model(seed=2))
    load_adapter(other, place)
    before = rows(adapted)
    moved(other, tiny.adamw(other), [0, 1])
    tiny.expect_equal(rows(other), before, "frozen rows")
    assert all(layer.frozen == tuple(FROZEN) for layer in injected(other).values())
