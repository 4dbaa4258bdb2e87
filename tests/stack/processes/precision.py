"""FSDP2 in bf16 with routers in fp32, as in docs/distributed.md, and FSDP1."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_moe import freeze_experts, injected, load_adapter, save_adapter

from . import tiny
from .training import expect_as_one_process, shard

DOCS = Path(__file__).parents[3] / "docs" / "distributed.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)


def check_bf16_base_without_a_policy(place):
    """The base is stored in bf16 and frozen; experts and routers stay fp32 and train as such."""
    expect_as_one_process(shard, dtype=torch.bfloat16)
    expect_as_one_process(shard, dtype=torch.bfloat16, tasks=True)


def shard_in_bf16(adapted, **options):
    """Runs the function printed in docs/distributed.md, with options for each of its calls."""
    scope = {"torch": torch}
    exec(BLOCKS[1], scope)
    scope["fully_shard"] = functools.partial(fully_shard, **options)
    return scope["shard_in_bf16"](adapted)


def check_bf16_policy_with_experts_in_fp32(place):
    """Losses equal those of a bf16 base, gradients those of one process with the same units.

    With units, autograd sums the bf16 gradients of an input that several units share in another order.
    """
    adapted, plain = shard_in_bf16(tiny.model()), tiny.model()
    single = init_device_mesh("cpu", (2, 1), mesh_dim_names=("model", "shard"))["shard"]
    whole = shard_in_bf16(tiny.model(), mesh=single)
    experts = {id(p) for m in injected(plain).values() for p in m.parameters(recurse=False)}
    for parameter in plain.parameters():
        if id(parameter) not in experts:
            parameter.data = parameter.data.bfloat16()
    seen = set()
    for layer in injected(adapted).values():
        layer.register_forward_hook(lambda m, x, y: seen.add((m.router_weight.dtype, y.dtype)))
    (losses, gradients), *_ = tiny.one_process(whole, tiny.adamw(whole), 1)
    loss = tiny.loss_of(adapted, adapted, dist.get_rank())
    loss.backward()
    assert loss == losses[dist.get_rank()] == tiny.loss_of(plain, plain, dist.get_rank())
    ours = {name: p.grad for name, p in tiny.trained(adapted).items()}
    tiny.expect_equal(ours, gradients, "gradients")
    assert seen == {(torch.float32, torch.bfloat16)}


def shard_1(adapted):
    return FSDP(
        adapted,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def check_fsdp1(place):
    """FSDP1 trains, saves and loads; freezing rows is refused, as its parameters are flattened."""
    adapted, whole = tiny.model(), tiny.model()
    wrapped = shard_1(adapted)
    optimizer = tiny.adamw(wrapped)
    reference = tiny.one_process(whole, tiny.adamw(whole), 2)
    for step, (losses, _) in enumerate(reference):
        loss = tiny.loss_of(wrapped, adapted, 2 * step + dist.get_rank())
        assert loss == losses[dist.get_rank()]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(wrapped, place)
    plain = load_adapter(tiny.base(), place)
    tiny.expect_equal(tiny.trained(plain), tiny.trained(whole), "weights")
    other = load_adapter(shard_1(tiny.model(seed=2)), place)
    batch = tiny.batch(7)
    assert torch.equal(other(**batch).logits, plain(**batch).logits)
    freeze_experts(adapted, [0])
    tiny.loss_of(wrapped, adapted, 0).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "FSDP2" in str(error)
    else:
        raise AssertionError("FSDP1 steps over frozen rows")
