"""accelerate's prepare, save_state, load_state and get_state_dict over two processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

from lora_moe import load_adapter

from . import tiny
from .saving import alone, content, drawn, logits, together


def accelerator_of(plugin=None):
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def expect_states_to_travel(accelerator, place, plain):
    """Three steps equal those of one process; save_state and load_state restore the weights and moments."""
    adapted = drawn()
    model, optimizer = accelerator.prepare(adapted, tiny.adamw(adapted))
    whole = accelerator.unwrap_model(model)
    theirs = alone(plain, place)
    assert together(model, place) == theirs
    accelerator.save_state(str(place / "state"), safe_serialization=False)
    runs = []
    for _ in range(2):
        losses = []
        for step in range(2):
            loss = tiny.loss_of(model, whole, 2 * step + dist.get_rank())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        runs.append(losses)
        accelerator.load_state(str(place / "state"))
    assert runs[0] == runs[1]
    assert together(model, place) == theirs
    state = accelerator.get_state_dict(model)
    whole.save_pretrained(
        place / "pretrained", is_main_process=accelerator.is_main_process, state_dict=state
    )
    dist.barrier()
    assert content(place / "pretrained") == theirs
    back = type(tiny.base()).from_pretrained(place / "pretrained")
    assert torch.equal(logits(load_adapter(back, place / "pretrained")), logits(plain))


def check_ddp(place):
    expect_states_to_travel(accelerator_of(), place, drawn())


def check_fsdp2(place):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    expect_states_to_travel(accelerator_of(plugin), place, drawn())
    PartialState._reset_state()
