"""Importers: files in each format's layout, created here, against the format's formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe import adapter_info, injected, load_adapter, use_routing
from lora_moe.convert import convert

from ..support.checkpoints import (
    MADE,
    PATHS,
    SIZES,
    D,
    E,
    X,
    coin,
    hydralora,
    lora_folders,
    meteora,
    mix,
    moe_peft,
    saved,
    values,
)
from ..support.cost import measured


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (D_in, D_out) in SIZES.items():
            parent, last = name.split(".")
            getattr(self, parent).add_module(last, nn.Linear(D_in, D_out, bias=False))

    def forward(self, x):
        x = x + torch.tanh(self.self_attn.q_proj(x))
        return x + self.mlp.down_proj(torch.tanh(self.mlp.up_proj(x)))


class Model(nn.Module):
    """Two blocks named as in a tiny Llama; the logits are of order one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(D, 11)
        self.double().eval()  # without dropout

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(x)


def by_formula(formula):
    """The logits of a model where the linear maps at PATHS add formula(path, x)."""
    model = Model()
    for path in PATHS:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, args, y, path=path: y + formula(path, args[0]))
    with torch.no_grad():
        return model(X)


def expect_formula(directory, formula):
    model = load_adapter(Model(), directory)
    with torch.no_grad():
        got, expected, base = model(X), by_formula(formula), Model()(X)
    assert (expected - base).abs().max() > 0.05  # the experts change the output
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= 1e-12, float(error)
    return model


@pytest.mark.parametrize("file", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", MADE)
def test_logits_equal_the_formula(tmp_path, kind, file):
    source, formula, options = MADE[kind](tmp_path / "source", file=file)
    converted = convert(source, tmp_path / "out", **options)
    assert converted.format == kind and converted.paths == (tmp_path / "out/lora_moe.safetensors",)
    expect_formula(tmp_path / "out", formula)
    again = convert(source, tmp_path / "again", format=kind, **options)
    assert again.paths[0].read_bytes() == converted.paths[0].read_bytes()


def test_scales_and_names_that_may_differ(tmp_path):
    source, formula, _ = moe_peft(tmp_path / "rs", use_rslora=True)
    convert(source, tmp_path / "a")
    expect_formula(tmp_path / "a", formula)
    source, formula, _ = coin(tmp_path / "named", adapter=".default", second=False)
    convert(source, tmp_path / "b")
    expect_formula(tmp_path / "b", formula)


def test_training_settings_are_converted(tmp_path):
    source, *_ = moe_peft(tmp_path / "mola", router_loss=True, router_aux_loss_coef=0.01, top_k=2)
    convert(source, tmp_path / "a")
    model = load_adapter(Model(), tmp_path / "a")
    config = injected(model)["model.layers.0.mlp.up_proj"].config
    assert config.balance_coef == 0.02 and config.z_coef == 0 and config.dropout == 0.05
    # MoE-PEFT's loss is E sum_e P_e * (share of tokens that took e), which is K when balanced
    with torch.enable_grad():
        model(X)
        routing = injected(model)["model.layers.0.mlp.up_proj"].routing
    p = torch.softmax(routing.logits, -1)
    taken = nn.functional.one_hot(p.topk(2, -1).indices, E).float()  # (T, K, E)
    theirs = 0.01 * E * (taken.mean(0) * p.mean(0)).sum()
    ours = config.balance_coef * lora_moe.losses.load_balance_loss(routing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    source, *_ = moe_peft(tmp_path / "without")
    convert(source, tmp_path / "b")
    assert adapter_info(tmp_path / "b")["adapters"][0]["config"].balance_coef == 0
    source, *_ = hydralora(tmp_path / "hydra", blc_weight=0.1)
    assert "blc_weight=0.1" in convert(source, tmp_path / "c").notes[0]


def test_dtypes_are_kept(tmp_path):
    source, *_ = hydralora(tmp_path / "a")
    state = torch.load(source / "adapter_model.bin", weights_only=True)
    torch.save({k: t.bfloat16() for k, t in state.items()}, source / "adapter_model.bin")
    convert(source, tmp_path / "out")
    assert {t.dtype for t in adapter_info(tmp_path / "out")["tensors"].values()} == {"BF16"}
    load_adapter(Model(), tmp_path / "out")


def test_peft_to_a_bank_and_back(tmp_path):
    loras = lora_folders(tmp_path / "loras")
    converted = convert(tmp_path / "loras", tmp_path / "bank", top_k=1)
    assert converted.format == "peft" and "routers are new" in converted.notes[0]

    def formula(own, scale):
        return lambda path, x: mix(x, torch.ones(2, 5, 1), [own[path]], scale) if path in own else 0

    def expect(model):
        for i, (own, scale) in enumerate(loras):
            with torch.no_grad(), use_routing(model, task_ids=torch.full((2,), i)):
                torch.testing.assert_close(model(X), by_formula(formula(own, scale)))

    expect(load_adapter(Model(), tmp_path / "bank"))
    back = convert(tmp_path / "bank", tmp_path / "folders")
    assert back.format == "lora_moe"
    assert [p.name for p in back.paths] == [f"expert_{i}" for i in range(4)]
    expect(lora_moe.from_peft(Model(), back.paths))
    convert(tmp_path / "folders", tmp_path / "again", top_k=1)
    expect(load_adapter(Model(), tmp_path / "again"))


def test_one_adapter_that_is_a_pickle(tmp_path):
    own, scale = lora_folders(tmp_path / "loras")[1]
    convert(tmp_path / "loras/expert_1", tmp_path / "bank")
    model = load_adapter(Model(), tmp_path / "bank")
    expected = by_formula(
        lambda path, x: mix(x, torch.ones(2, 5, 1), [own[path]], scale) if path in own else 0
    )
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)


def test_other_weights_beside_it_are_named(tmp_path):
    source, *_ = coin(tmp_path / "source")
    (source / "non_lora_trainables.bin").touch()
    assert "ignored non_lora_trainables.bin" in convert(source, tmp_path / "out").notes[-1]


def test_a_large_file_is_converted_within_its_memory(tmp_path):
    tensors = {}
    for e in range(E):
        tensors[f"base_model.model.a.lora_B{e}.weight"] = values(300_000, 4)
    tensors |= {
        "base_model.model.a.lora_A.weight": values(4, 8),
        "base_model.model.a.lora_route.weight": values(E, 8),
    }
    source = saved(tmp_path / "source", {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, tensors)
    size = (source / "adapter_model.bin").stat().st_size
    assert size > 16 << 20
    with measured() as cost:
        convert(source, tmp_path / "out")
    assert cost.rise < 2 * size + (64 << 20)


def test_the_command(tmp_path, capsys):
    from lora_moe.cli import main

    source, formula, options = meteora(tmp_path / "source")
    adapters = ["--adapters", *map(str, options["adapters"])]
    assert main(["convert", str(source), str(tmp_path / "out"), *adapters]) == 0
    shown = capsys.readouterr().out
    assert (
        "meteora" in shown and "lora_moe.safetensors" in shown and "7 tensors of the base" in shown
    )
    expect_formula(tmp_path / "out", formula)
    assert main(["convert", str(source), str(tmp_path / "no")]) == 1
    assert "lora-moe convert: " in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "folders")]) == 0
    assert "expert_3" in capsys.readouterr().out
