"""Importers name the fields and tensors that they do not support, and write nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lora_moe.convert import FORMATS, convert

from ..support.checkpoints import (
    MADE,
    D,
    E,
    F,
    R,
    X,
    changed,
    hydralora,
    lora_folders,
    meteora,
    saved,
)


@pytest.mark.parametrize("kind", MADE)
def test_unknown_tensors_are_refused_by_name(tmp_path, kind):
    source, _, options = MADE[kind](tmp_path / "source")
    path = "model.layers.0.mlp.up_proj.lora_magnitude_vector.weight"
    changed(source, lambda state: state.update({path: torch.ones(3), "lora_extra": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"(?s)tensor .*lora_magnitude_vector.*lora_extra"):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["loramoe", "mola", "hydralora", "coin"])
def test_unknown_fields_are_refused_by_name(tmp_path, kind):
    source, *_ = MADE[kind](tmp_path / "source", use_dora=True, modules_to_save=["lm_head"])
    with pytest.raises(
        ValueError, match=r"use_dora=True.*modules_to_save=\['lm_head'\]|modules_to"
    ):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MISFITS = {
    "loramoe": [
        ("experts.3.lora_A.weight", None, r"missing \['3\.A'\]"),
        ("moe_gate.weight", torch.ones(E + 1, D), r"expected \(4, 8\), got \(5, 8\)"),
        ("experts.0.lora_B.weight", torch.ones(F, R + 1), r"expected \(D_out, 2\), got \(12, 3\)"),
    ],
    "mola": [
        ("experts.1.lora_A.weight", torch.ones(R, D + 1), "expected experts of equal size"),
        ("experts.1.lora_A.weight", torch.ones(R, D, dtype=torch.int64), "expected one of"),
        ("experts.1.lora_A.weight", torch.full((R, D), math.nan), "finite"),
    ],
    "hydralora": [
        ("lora_B2.weight", None, r"expected lora_A, lora_route and lora_B0"),
        ("lora_A.weight", torch.ones(R + 1, D), r"expected \(2, D_in\), got \(3, 8\)"),
        ("lora_route.weight", torch.ones(E), r"expected \(4, 8\), got \(4,\)"),
    ],
    "coin": [
        ("loraA.2.mlp.weight", None, "expected loraA and loraB of each expert"),
        ("loraA.2.weight", torch.ones(R, D), "expected the same values as"),
        ("lora_router.weight", None, "and a router"),
    ],
    "meteora": [
        ("lora_A.weight", torch.ones(3, D), r"expected \(8, D_in\)"),
        ("moe_gate.weight", torch.ones(E, D + 1), "one row per adapter"),
        ("lora_B.weight", None, "expected moe_gate, lora_A and lora_B"),
    ],
}


@pytest.mark.parametrize(("kind", "case"), [(k, i) for k in MISFITS for i in range(3)])
def test_tensors_that_do_not_fit(tmp_path, kind, case):
    end, value, message = MISFITS[kind][case]
    source, _, options = MADE[kind](tmp_path / "source")

    def change(state):
        key = next(
            k
            for k in state
            if k.endswith(f"layers.0.mlp.up_proj.{end}") or (end in k and "up" in k)
        )
        del state[key]
        if value is not None:
            state[key] = value

    changed(source, change)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


ANYTHING = (True, 10**12, "2", [1], {"a": 1})
FIELDS = {
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
    ),
    *("num_experts", "top_k", "router_loss", "router_aux_loss_coef", "lora_nums", "expert_num"),
}


@pytest.mark.parametrize("kind", [*MADE, "peft"])
def test_fields_may_hold_anything(tmp_path, kind):
    if kind == "peft":
        lora_folders(tmp_path / "source")
        source, options, folder = tmp_path / "source", {}, tmp_path / "source/expert_0"
    else:
        source, _, options = MADE[kind](tmp_path / "source")
        folder = options.get("adapters", [source])[0]
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for field in sorted(FIELDS):
        for value in ANYTHING:
            file.write_text(json.dumps(config | {field: value}))
            try:
                convert(source, tmp_path / "out", **options)
            except ValueError as error:
                assert len(str(error)) < 3000, error


def test_other_formats_and_options(tmp_path):
    source, *_ = saved(tmp_path / "ia3", {"peft_type": "IA3"}, {"a": X}), None
    with pytest.raises(ValueError, match=r"expected one of the formats .* got peft_type 'IA3'"):
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match=f"format: expected one of .*{FORMATS[0]}"):
        convert(source, tmp_path / "out", format="gguf")
    source, _, options = meteora(tmp_path / "meteora")
    with pytest.raises(ValueError, match="adapters: expected the folders of the LoRAs"):
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="the ranks of 3 adapters together"):
        convert(source, tmp_path / "out", adapters=options["adapters"][:3])
    source, *_ = hydralora(tmp_path / "hydra")
    with pytest.raises(ValueError, match="top_k: expected None for hydralora"):
        convert(source, tmp_path / "out", top_k=2)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/__0_0.distcp").touch()
    with pytest.raises(FileNotFoundError, match="dcp_to_torch_save"):
        convert(tmp_path / "dcp", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["training", "model.layers.0.mlp.up_proj.inner", "__class__.x"])
def test_paths_that_no_module_has(tmp_path, path):
    source, *_ = hydralora(tmp_path / "source")

    def change(state):
        for key in [k for k in state if "layers.1.mlp.down_proj" in k]:
            state[f"{path}.{key.partition('down_proj.')[2]}"] = state.pop(key)

    changed(source, change)
    with pytest.raises(ValueError, match=f"{path}: expected a module's path"):
        convert(source, tmp_path / "out")
