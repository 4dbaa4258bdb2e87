"""Two processes train like one that accumulates the same two micro-batches, each loss halved.

Losses, gradients and weights of three AdamW steps are bitwise equal.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from . import tiny

STEPS = 3


def shard(adapted, **options):
    for layer in adapted.model.layers:
        fully_shard(layer, **options)
    return fully_shard(adapted, **options)


def expect_as_one_process(wrap, tasks=False, prepare=None, **fields):
    """Trains a model wrapped by `wrap` and an unwrapped one in each process, and compares them."""
    adapted, whole = tiny.model(**fields), tiny.model(**fields)
    for each in (adapted, whole):
        if prepare:
            prepare(each)
    wrapped = wrap(adapted)
    optimizer = tiny.adamw(adapted)
    reference = tiny.one_process(whole, tiny.adamw(whole), STEPS, tasks=tasks)
    for step, (losses, gradients) in enumerate(reference):
        loss = tiny.loss_of(wrapped, adapted, 2 * step + dist.get_rank(), tasks)
        loss.backward()
        assert loss == losses[dist.get_rank()], f"step {step}: {loss} {losses}"
        ours = {name: p.grad for name, p in tiny.trained(adapted).items()}
        tiny.expect_equal(ours, gradients, f"gradients of step {step}")
        optimizer.step()
        optimizer.zero_grad()
    tiny.expect_equal(tiny.trained(adapted), tiny.trained(whole), "weights")


def check_ddp_with_routers_and_aux_loss(place):
    expect_as_one_process(DDP)


def check_ddp_with_task_ids(place):
    """Works without find_unused_parameters, as routers that are not used get a zero gradient."""
    expect_as_one_process(DDP, tasks=True, router_bias=True)


def check_ddp_with_shared_a_and_frozen_experts(place):
    def prepare(adapted):
        from lora_moe import freeze_experts

        freeze_experts(adapted, [1])

    expect_as_one_process(DDP, prepare=prepare, shared_a=True, r=2)


def check_ddp_with_checkpointing(place):
    def prepare(adapted):
        adapted.gradient_checkpointing_enable({"use_reentrant": False})

    expect_as_one_process(lambda m: DDP(m, static_graph=True), prepare=prepare)
    expect_as_one_process(DDP, tasks=True, prepare=prepare)


def check_ddp_without_sync(place):
    """Each process accumulates two micro-batches, and gradients are reduced once."""
    adapted, whole = tiny.model(), tiny.model()
    ddp, rank = DDP(adapted), dist.get_rank()
    with ddp.no_sync():
        (tiny.loss_of(ddp, adapted, 2 * rank) / 2).backward()
    (tiny.loss_of(ddp, adapted, 2 * rank + 1) / 2).backward()
    sums = []
    for other in range(2):
        whole.zero_grad()
        for index in (2 * other, 2 * other + 1):
            (tiny.loss_of(whole, whole, index) / 4).backward()
        sums.append({name: p.grad.clone() for name, p in tiny.trained(whole).items()})
    expected = {name: sums[0][name] + sums[1][name] for name in sums[0]}
    tiny.expect_equal({n: p.grad for n, p in tiny.trained(adapted).items()}, expected, "gradients")


def check_fsdp2_with_routers_and_aux_loss(place):
    expect_as_one_process(shard)


def check_fsdp2_with_task_ids(place):
    expect_as_one_process(shard, tasks=True, router_bias=True, temperature=2.0)


def check_fsdp2_with_checkpointing(place):
    def prepare(adapted):
        adapted.gradient_checkpointing_enable({"use_reentrant": False})

    expect_as_one_process(shard, prepare=prepare)
    expect_as_one_process(shard, tasks=True, prepare=prepare)


def check_fsdp2_without_resharding_and_with_replicas(place):
    expect_as_one_process(lambda m: shard(m, reshard_after_forward=False))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    expect_as_one_process(lambda m: shard(m, mesh=mesh))


def check_fsdp2_with_weights_offloaded(place):
    expect_as_one_process(lambda m: shard(m, offload_policy=CPUOffloadPolicy(pin_memory=False)))


def check_fsdp2_from_meta(place):
    """A model sharded on the meta device; scaling and routers are initialized correctly."""
    with torch.device("meta"):
        adapted = tiny.model()
    shard(adapted)
    adapted.to_empty(device="cpu")
    whole = tiny.model()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(adapted, whole.state_dict(), options=options)
    for name, buffer in whole.named_buffers():  # not persistent
        adapted.get_buffer(name).copy_(buffer)
    ours = tiny.loss_of(adapted, adapted, 0)
    assert ours == tiny.loss_of(whole, whole, 0)
