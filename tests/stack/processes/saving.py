"""Adapters saved by two processes equal byte for byte those of one process, and load into either."""

from __future__ import annotations

import copy
import json
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from lora_moe import freeze_experts, injected, load_adapter, safefile, save_adapter

from . import tiny
from .training import shard

FIELDS = {"modules_to_save": ("lm_head",), "selection_bias": True, "router_bias": True}


def drawn(seed=1):
    """A model that has everything that a file can hold."""
    adapted = tiny.model(seed=seed, **FIELDS)
    freeze_experts(adapted, [seed % 3])
    with torch.no_grad():
        adapted.lm_head.weight.add_(0.1 * seed)
        for layer in injected(adapted).values():
            layer.router_bias.normal_()
            layer.selection_bias.normal_()
    return adapted


def alone(adapted, place) -> tuple[dict, bytes]:
    """(header, data) of the file written by one process."""
    if dist.get_rank() == 0:
        save_adapter(adapted, place / "alone")
    dist.barrier()
    return content(place / "alone")


def together(adapted, place, **options) -> tuple[dict, bytes]:
    """(header, data) of the file after every process has called save_adapter."""
    save_adapter(adapted, place / "together", **options)
    dist.barrier()
    return content(place / "together")


def content(directory) -> tuple[dict, bytes]:
    """(header, data) of a file, independent of the order of its metadata."""
    with open(directory / "lora_moe.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return header, file.read()


def logits(model):
    model.eval()
    with torch.no_grad():
        out = model(**tiny.batch(7)).logits
    model.train()
    return out


def expect_both_ways(wrap, place):
    """The wrapped and the plain model write the same file, and each loads that of the other."""
    plain = drawn()
    wrapped = wrap(drawn())
    theirs = alone(plain, place)
    assert together(wrapped, place) == theirs
    fresh = load_adapter(tiny.base(), place / "together")
    assert torch.equal(logits(fresh), logits(plain))
    other = wrap(drawn(seed=2))
    assert not torch.equal(logits(other), logits(plain))  # also leaves FSDP2's root gathered
    load_adapter(other, place / "alone")
    assert torch.equal(logits(other), logits(plain))
    assert together(other, place) == theirs
    for name, layer in injected(plain).items():
        assert layer.frozen == fresh.get_submodule(name).frozen == (1,)


# --- wrappers --------------------------------------------------------------------------------------


def check_ddp(place):
    expect_both_ways(DDP, place)


def check_compiled(place):
    def parts(adapted):
        adapted.model.layers[0] = torch.compile(adapted.model.layers[0], backend="eager")
        return DDP(torch.compile(adapted, backend="eager"))

    expect_both_ways(parts, place)
    expect_both_ways(lambda m: torch.compile(DDP(m), backend="eager"), place)


def check_fsdp2(place):
    expect_both_ways(shard, place)


def check_fsdp2_root_alone(place):
    expect_both_ways(fully_shard, place)


def check_fsdp2_compiled(place):
    expect_both_ways(lambda m: torch.compile(shard(m), backend="eager"), place)


def check_fsdp2_with_weights_offloaded(place):
    policy = CPUOffloadPolicy(pin_memory=False)
    expect_both_ways(lambda m: shard(m, offload_policy=policy), place)


def check_fsdp2_with_replicas(place):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    expect_both_ways(lambda m: shard(m, mesh=mesh), place)


def check_fsdp2_without_resharding(place):
    expect_both_ways(lambda m: shard(m, reshard_after_forward=False), place)


def check_not_contiguous(place):
    def transposed(adapted):
        for layer in injected(adapted).values():
            layer.lora_A.data = layer.lora_A.data.T.contiguous().T
        return adapted

    expect_both_ways(transposed, place)


# --- which ranks call, which write -----------------------------------------------------------------


def check_rank_0_alone_does_not_wait(place):
    """Nothing is sharded, so rank 0 may call alone; waiting for the others would time out."""
    ddp = DDP(drawn())
    if dist.get_rank() == 0:
        save_adapter(ddp, place)
        load_adapter(ddp, place)


def check_every_rank_calls_and_one_writes(place):
    for wrap in (DDP, shard):
        with mock.patch.object(safefile, "write", side_effect=safefile.write) as write:
            together(wrap(drawn()), place)
        counts = [None, None]
        dist.all_gather_object(counts, write.call_count)
        assert counts == [1, 0], counts


def check_mesh_without_rank_0(place):
    """A model on a mesh without rank 0 is written by the first process of its mesh."""
    mine = init_device_mesh("cpu", (2, 1), mesh_dim_names=("model", "shard"))["shard"]
    adapted = shard(drawn(seed=dist.get_rank() + 1), mesh=mine)
    save_adapter(adapted, place / str(dist.get_rank()))
    plain = load_adapter(tiny.base(), place / str(dist.get_rank()))
    assert torch.equal(logits(plain), logits(drawn(seed=dist.get_rank() + 1)))


def check_an_error_reaches_every_rank(place):
    """An error on the writer is raised on every rank, instead of leaving the others in a barrier."""
    adapted = shard(drawn())
    with torch.no_grad():
        next(iter(injected(adapted).values())).lora_A.fill_(float("nan"))
    expected = ValueError if dist.get_rank() == 0 else RuntimeError
    for directory in (place, place / "no directory" / "x"):
        (place / "no directory").touch()
        try:
            save_adapter(adapted, directory)
        except expected as error:
            assert "lora_A: expected finite values, got NaN" in str(error)
        else:
            raise AssertionError("saved a NaN")


# --- other ways to disk ----------------------------------------------------------------------------


def check_state_dict_keys_are_attribute_paths(place):
    for wrap in (DDP, shard):
        adapted = drawn()
        wrap(adapted)
        for key, tensor in adapted.state_dict().items():
            path, _, name = key.rpartition(".")
            assert getattr(adapted.get_submodule(path), name).shape == tensor.shape


def check_dcp(place):
    """Saved sharded, loaded with another sharding and unsharded."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    plain, sharded = drawn(), shard(drawn())
    dcp.save({"model": get_model_state_dict(sharded)}, checkpoint_id=place / "dcp")
    for wrap in (lambda m: m, fully_shard):
        other = wrap(drawn(seed=2))
        state = {"model": get_model_state_dict(other)}
        dcp.load(state, checkpoint_id=place / "dcp")
        set_model_state_dict(other, state["model"])
        assert torch.equal(logits(other), logits(plain))
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, cpu_offload=True)
    state = get_model_state_dict(sharded, options=options)
    other = shard(drawn(seed=2))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(other, state, options=options)
    tiny.expect_equal(tiny.trained(other), tiny.trained(plain), "parameters")


def check_save_pretrained(place):
    """Writes base under its own names and the experts; also with a state dict on only rank 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import LlamaForCausalLM

    theirs, plain = alone(drawn(), place), drawn()
    sharded = shard(drawn())
    state = get_model_state_dict(
        sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        sharded.save_pretrained(place / "state", state_dict=copy.copy(state))
    dist.barrier()
    models = {"main": drawn(), "sharded": sharded, "root": fully_shard(drawn())}
    for name, adapted in models.items():
        logits(adapted)  # leaves FSDP2's root gathered
        adapted.save_pretrained(place / name, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    for name in ("state", *models):
        assert content(place / name) == theirs, name
        back = LlamaForCausalLM.from_pretrained(place / name)
        assert torch.equal(back.model.norm.weight, plain.model.norm.weight)
        assert torch.equal(logits(load_adapter(back, place / name)), logits(plain)), name
