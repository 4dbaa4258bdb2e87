"""Saving and loading adapters: a load is complete or changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import lora_moe
from lora_moe import (
    LoraMoeConfig,
    LoraMoeLinear,
    adapter_info,
    inject,
    injected,
    load_adapter,
    save_adapter,
)

from ..support.adapters import CONFIG, FILE, Model, assert_unchanged, rewrite, trained

KEYS = {
    f"blocks.{i}.{m}.{t}"
    for i in (0, 1)
    for m in "qv"
    for t in ("lora_A", "lora_B", "router.weight", "router.selection_bias")
}

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tmp_path):
    save_adapter(trained(), tmp_path)
    return tmp_path


def test_into_a_fresh_model(saved):
    model, fresh = trained(), Model()
    assert load_adapter(fresh, saved) is fresh
    assert torch.equal(fresh(X), model(X))
    assert_unchanged(fresh, model.state_dict())
    assert [layer.config for layer in injected(fresh).values()] == [CONFIG] * 4
    training = {n.rpartition(".")[2] for n, p in fresh.named_parameters() if p.requires_grad}
    assert training == {"lora_A", "lora_B", "router_weight"}


def test_into_a_model_with_the_same_experts(saved):
    model, other = trained(), trained(seed=2)
    layers, parameters = injected(other), dict(other.named_parameters())
    assert not torch.allclose(other(X), model(X))
    load_adapter(other, saved)
    assert torch.equal(other(X), model(X))
    assert injected(other) == layers  # the same objects, so an optimizer's references stay valid
    assert all(other.get_parameter(n) is p for n, p in parameters.items())


def test_several_configurations(tmp_path):
    model = inject(Model(), LoraMoeConfig(num_experts=2, r=3, target_modules="blocks.0.q"))
    inject(model, LoraMoeConfig(num_experts=3, r=2, shared_a=True, target_modules=("1.v",)))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    fresh = load_adapter(Model(), tmp_path)
    assert torch.equal(fresh(X), model(X))
    assert [layer.config.num_experts for layer in injected(fresh).values()] == [2, 3]


def test_a_single_layer(tmp_path):
    layer, other = (LoraMoeLinear(nn.Linear(4, 4), CONFIG) for _ in range(2))
    nn.init.normal_(layer.lora_B)
    save_adapter(layer, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(other.lora_B, layer.lora_B)
    with pytest.raises(ValueError, match="the model itself"):
        load_adapter(nn.Linear(4, 4), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_model_decides_the_dtype(saved, dtype):
    fresh = load_adapter(Model(dtype=dtype), saved)
    for name, layer in injected(fresh).items():
        want = trained().get_submodule(name).lora_A
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert layer.lora_A.dtype == wide and torch.equal(layer.lora_A, want.to(wide))
    fresh = load_adapter(Model(dtype=dtype), saved, adapter_dtype="base")
    for name, layer in injected(fresh).items():
        want = trained().get_submodule(name).lora_A
        assert layer.lora_A.dtype == dtype and torch.equal(layer.lora_A, want.to(dtype))


def test_what_a_model_may_choose_for_itself(saved):
    own = LoraMoeConfig(**{**CONFIG.to_dict(), "dropout": 0.3, "balance_coef": 0.0})
    model = trained(own, seed=2)
    load_adapter(model, saved)
    assert injected(model)["blocks.0.q"].config == own
    assert torch.equal(model.eval()(X), trained()(X))


def test_adapter_info(saved):
    info = adapter_info(saved)
    assert info["version"] == 2 and info["library"] == lora_moe.__version__
    (adapter,) = info["adapters"]
    assert adapter["config"] == CONFIG
    assert adapter["modules"] == ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]
    assert info["tensors"].keys() == KEYS
    assert info["tensors"]["blocks.0.q.lora_A"][:2] == ("F32", (8, 6))


def test_the_base_is_not_in_the_file(saved):
    assert safetensors.torch.load_file(saved / FILE).keys() == KEYS


VERSION_1 = {  # all fields that version 0.1 wrote
    "num_experts": 4, "r": [1, 2, 3, 2], "top_k": 2, "alpha": 5.0, "dropout": 0.0, "gate": "softmax",
    "renormalize": True, "shared_a": False, "selection_bias": True, "target_modules": ["q", "v"],
    "exclude_modules": [], "balance_coef": 0.01, "z_coef": 0.001,
}  # fmt: skip


def as_version_1(directory, fields=VERSION_1):
    """Rewrites the saved file as version 1: a flat configuration and the layer's own names."""
    names = {"router.weight": "router_weight", "router.selection_bias": "selection_bias"}

    def rename(tensors):
        for new, old in names.items():
            tensors = {k.replace(f".{new}", f".{old}"): t for k, t in tensors.items()}
        return tensors

    modules = adapter_info(directory)["adapters"][0]["modules"]
    adapters = [{"config": fields, "modules": modules}]
    info = {"version": 1, "library": "0.1.0", "adapters": adapters}
    rewrite(directory, rename, {"format": "pt", "lora_moe": json.dumps(info)})


@pytest.mark.parametrize("injected_before", [False, True])
def test_files_of_version_1_load_with_the_same_results(saved, injected_before):
    as_version_1(saved)
    model = load_adapter(trained(seed=2) if injected_before else Model(), saved)
    assert torch.equal(model(X), trained()(X))
    assert adapter_info(saved)["version"] == 1


def test_version_1_renormalized_unless_it_said_otherwise(saved):
    fields = {k: v for k, v in VERSION_1.items() if k != "renormalize"} | {"top_k": 1}
    as_version_1(saved, fields)
    (adapter,) = adapter_info(saved)["adapters"]
    assert adapter["config"].normalizes and adapter["config"].top_k == 1
    as_version_1(saved, VERSION_1 | {"temperature": 2.0})
    with pytest.raises(ValueError, match=r"fields of version 1, got .*temperature"):
        adapter_info(saved)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        save_adapter(Model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


SAVE_FOREVER = """
import sys, torch
from tests.support.adapters import trained
from lora_moe import injected, save_adapter
model = trained()
print("ready", flush=True)
value = 0
while True:
    value = 1 - value
    for layer in injected(model).values():
        for tensor in layer.adapter_state().values():
            tensor.detach().fill_(value)
    save_adapter(model, sys.argv[1])
"""


def test_a_kill_during_a_save_leaves_one_whole_version(saved):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SAVE_FOREVER, str(saved)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    fresh = load_adapter(Model(), saved)
    values = {
        float(v) for layer in injected(fresh).values() for v in layer.lora_B.detach().flatten()
    }
    assert values in ({0.0}, {1.0})
    # plus what a killed write leaves: our temporary file, or the one that safetensors creates for it
    left = {
        name for name in os.listdir(saved) if not (name.endswith(".tmp") or name.startswith(".tmp"))
    }
    assert left == {FILE, "README.md"}
