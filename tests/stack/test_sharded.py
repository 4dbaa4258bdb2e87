"""Wrapped and sharded models in a single process; test_distributed.py uses two."""

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, inject, load_adapter, save_adapter
from lora_moe.sharded import plain_path, unwrapped, whole_shape

CONFIG = LoraMoeConfig(num_experts=2, r=1, target_modules=("0",))


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


class DeepSpeedEngine(nn.Module):
    """A stand-in for DeepSpeed's class, which need not be installed."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class PipelineEngine(DeepSpeedEngine):
    """A subclass, as in DeepSpeed."""


@pytest.fixture
def process(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["DDP", "DDP, compiled", "DeepSpeedEngine", "PipelineEngine"])
def test_experts_in_a_wrapped_model_are_refused(kind, process, tmp_path):
    """DDP and DeepSpeed would not synchronize parameters that are added later."""
    wrap = {
        "DDP": nn.parallel.DistributedDataParallel,
        "DDP, compiled": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m)),
    }.get(kind) or globals()[kind]
    save_adapter(inject(net(), CONFIG), tmp_path)
    for attempt in (lambda m: inject(m, CONFIG), lambda m: load_adapter(m, tmp_path)):
        wrapped = wrap(net())
        before = set(wrapped.state_dict())
        with pytest.raises(ValueError, match=r"would not synchronize .* first, then wrap it"):
            attempt(wrapped)
        assert set(wrapped.state_dict()) == before
        load_adapter(wrap(inject(net(), CONFIG)), tmp_path)  # experts that were there before


def test_experts_in_a_model_that_deepspeed_has_taken_are_refused():
    """Even without its engine, as ZeRO's optimizer only has the earlier parameters."""
    model = net()
    model[1].weight._hp_mapping = None
    with pytest.raises(ValueError, match=r"deepspeed.initialize.* would not synchronize"):
        inject(model, CONFIG)


def test_wrappers_leave_no_trace():
    model = net()
    compiled = torch.compile(model)
    assert unwrapped(nn.DataParallel(PipelineEngine(compiled))) is model
    assert plain_path("_orig_mod.layers.0._checkpoint_wrapped_module.q") == "layers.0.q"


def test_a_state_dict_in_place_of_the_models_values(tmp_path):
    """As gathered by accelerate; DDP adds a prefix."""
    model, other = inject(net(), CONFIG), inject(net(), CONFIG)
    nn.init.normal_(other[0].lora_B)
    state = {f"module.{key}": value for key, value in other.state_dict().items()}
    save_adapter(model, tmp_path, state_dict=state)
    loaded = load_adapter(net(), tmp_path)
    assert torch.equal(loaded[0].lora_B, other[0].lora_B)
    assert torch.equal(loaded[0].router_weight, other[0].router_weight)
    del state["module.0.lora_A"]
    with pytest.raises(ValueError, match=r"state_dict: expected .* got\s+0.lora_A: missing"):
        save_adapter(model, tmp_path, state_dict=state)


def test_zero_3_parameters_have_their_whole_shape():
    """transformers' Conv1D has no in_features to read it from."""
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(3, 5)
    base.weight.ds_shape, base.weight.data = base.weight.shape, torch.empty(0)
    assert whole_shape(base.weight) == (5, 3)
    layer = inject(nn.Sequential(base), LoraMoeConfig(num_experts=2, r=1, target_modules=("0",)))[0]
    assert (layer.in_features, layer.out_features) == (5, 3)
