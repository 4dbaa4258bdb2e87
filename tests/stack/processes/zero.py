"""DeepSpeed's ZeRO-2 and ZeRO-3 on CPUs: the losses, weights and files of one process."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from lora_moe import freeze_experts, inject, injected, load_adapter

from . import tiny
from .saving import alone, content, drawn, logits, together

# allows for rounding: ZeRO sums gradients in flat buckets
TOLERANCE = 1e-5


def engine_of(adapted, stage):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=adapted, optimizer=tiny.adamw(adapted), config=config)[0]


def expect_as_one_process(stage, tasks=False, **fields):
    adapted, whole = tiny.model(**fields), tiny.model(**fields)
    engine = engine_of(adapted, stage)
    reference = tiny.one_process(whole, tiny.adamw(whole), 3, tasks=tasks)
    for step, (losses, gradients) in enumerate(reference):
        loss = tiny.loss_of(engine, adapted, 2 * step + dist.get_rank(), tasks)
        torch.testing.assert_close(loss, losses[dist.get_rank()], rtol=TOLERANCE, atol=0)
        engine.backward(loss)
        ours = {name: safe_get_full_grad(p) for name, p in tiny.trained(adapted).items()}
        tiny.expect_equal(ours, gradients, f"gradients of step {step}", TOLERANCE)
        engine.step()
    ours = {name: safe_get_full_fp32_param(p) for name, p in tiny.trained(adapted).items()}
    tiny.expect_equal(ours, tiny.trained(whole), "weights", TOLERANCE)


def check_zero_2(place):
    expect_as_one_process(2)
    expect_as_one_process(2, tasks=True, router_bias=True)


def check_zero_3(place):
    expect_as_one_process(3)
    expect_as_one_process(3, tasks=True, router_bias=True)


def check_saved_both_ways(place):
    """Saved through the engine or the model in it; loaded into an engine and into a plain model."""
    plain = drawn()
    theirs = alone(plain, place)
    for stage in (2, 3):
        engine = engine_of(drawn(), stage)
        assert together(engine, place) == theirs
        assert together(engine.module, place) == theirs
        fresh = load_adapter(tiny.base(), place / "together")
        assert torch.equal(logits(fresh), logits(plain))
        other = engine_of(drawn(seed=2), stage)
        load_adapter(other, place / "alone")
        assert torch.equal(logits(other), logits(plain))
        assert together(other, place) == theirs


def check_loaded_values_outlive_a_step(place):
    """ZeRO's optimizer steps fp32 copies, which must be loaded as well."""
    plain = tiny.model()
    alone(plain, place)
    tiny.one_process(plain, tiny.adamw(plain), 1)
    for stage in (2, 3):
        adapted = tiny.model(seed=2)
        engine = engine_of(adapted, stage)
        load_adapter(engine.module, place / "alone")
        engine.backward(tiny.loss_of(engine, adapted, dist.get_rank()))
        engine.step()
        ours = {name: safe_get_full_fp32_param(p) for name, p in tiny.trained(adapted).items()}
        tiny.expect_equal(ours, tiny.trained(plain), "weights", TOLERANCE)


def check_save_pretrained(place):
    theirs = alone(drawn(), place)
    for stage in (2, 3):
        engine = engine_of(drawn(), stage)
        directory = place / str(stage)
        engine.module.save_pretrained(directory, is_main_process=dist.get_rank() == 0)
        dist.barrier()
        assert content(directory) == theirs
        back = type(tiny.base()).from_pretrained(directory)
        assert torch.equal(logits(load_adapter(back, directory)), logits(drawn()))


def check_frozen_experts_are_refused(place):
    """ZeRO steps a flattened copy, so frozen rows would change silently."""
    for stage in (2, 3):
        adapted = tiny.model()
        freeze_experts(adapted, [1])
        engine = engine_of(adapted, stage)
        engine.backward(tiny.loss_of(engine, adapted, 0))
        try:
            engine.step()
        except RuntimeError as error:
            assert "train with DDP or FSDP2" in str(error)
        else:
            raise AssertionError(f"ZeRO-{stage} steps over frozen rows")


def check_inject_comes_too_late(place):
    for stage in (2, 3):
        base = tiny.base()
        engine = engine_of(base, stage)
        config = next(iter(injected(tiny.model()).values())).config
        for model in (engine, engine.module):
            try:
                inject(model, config)
            except ValueError as error:
                assert "would not synchronize" in str(error), error
            else:
                raise AssertionError(f"ZeRO-{stage}: {type(model)} takes experts too late")
