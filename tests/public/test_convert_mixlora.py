"""MixLoRA files created here in its layout give the mixlora package's logits after conversion."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from lora_moe import adapter_info, injected, load_adapter
from lora_moe.convert import convert

from ..support.models import tiny

D, F, E, LAYERS = 16, 24, 4, 2
SIZES = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
OLD = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 10, 11, 12, 3]])


def folder_of(tmp_path, ffn=tuple(SIZES), attention=("q_proj", "o_proj"), old=False, **fields):
    """A checkpoint of random experts in MixLoRA's layout."""
    g, tensors, rank = (
        torch.Generator().manual_seed(0),
        {},
        fields.get("expert_lora", {}).get("r", 3),
    )

    def values(*shape, std=0.4):
        return std * torch.randn(shape, generator=g)

    for i in range(LAYERS):
        at = f"mixlora.layers.{i}"
        tensors[f"{at}.mlp.{'gate' if old else 'moe_gate'}.weight"] = values(E, D)
        for name in ffn:
            D_in, D_out = SIZES[name]
            for e in range(E):
                middle = f"experts.{e}.{OLD[name]}_proj" if old else f"{name}.experts.{e}"
                tensors[f"{at}.mlp.{middle}.lora_A.weight"] = values(rank, D_in)
                tensors[f"{at}.mlp.{middle}.lora_B.weight"] = values(D_out, rank)
        for name in attention:
            tensors[f"{at}.self_attn.{name}.lora_A.weight"] = values(3, D)
            tensors[f"{at}.self_attn.{name}.lora_B.weight"] = values(D, 3)
    config = {
        "base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA",
        "bias": "none", "r": 3, "lora_alpha": 6, "lora_dropout": 0.05, "num_experts": E, "top_k": 2,
        "routing_strategy": "mixtral" if old else "mixlora", "act_fn": "silu",
        "target_modules": [*ffn, *attention],
    }  # fmt: skip
    folder = tmp_path / ("old" if old else "source")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def converted(folder, tmp_path):
    done = convert(folder, tmp_path / "out")
    assert done.format == "mixlora"
    return load_adapter(tiny.base(0), tmp_path / "out").eval()


def theirs(folder):
    """The model as the mixlora package builds it, with the experts' dropout off."""
    mixlora = pytest.importorskip("mixlora.model")
    model = tiny.base(0).eval()
    mixlora.inject_adapter_in_model(model, *mixlora.load_adapter_weights(str(folder), device="cpu"))
    for layer in model.model.layers:
        for experts in layer.mlp.mixlora_moes.values():
            for expert in experts.experts_.values():
                expert.eval()
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "top_k": 3},
        {"ffn": ("gate_proj", "up_proj")},
        {"ffn": ("down_proj",), "attention": ()},
    ],
    ids=str,
)
def test_the_mixlora_package_gives_the_same_logits(options, tmp_path):
    folder = folder_of(tmp_path, **options)
    model = converted(folder, tmp_path)
    with torch.no_grad():
        got, want, base = model(IDS).logits, theirs(folder)(IDS).logits, tiny.base(0)(IDS).logits
    assert (want - base).abs().max() > 0.05
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_older_layout_is_the_same_adapter(tmp_path):
    convert(folder_of(tmp_path), tmp_path / "new")
    convert(folder_of(tmp_path, old=True), tmp_path / "again")
    logits = []
    for name in ("new", "again"):
        with torch.no_grad():
            logits.append(load_adapter(tiny.base(0), tmp_path / name).eval()(IDS).logits)
    assert torch.equal(*logits)


def test_experts_may_have_a_rank_and_a_scale_of_their_own(tmp_path):
    own = {"r": 2, "lora_alpha": 7, "lora_dropout": 0.1, "use_rslora": True}
    (tmp_path / "all").mkdir()
    alike = folder_of(tmp_path / "all", attention=(), expert_lora={"r": 2}, **own)
    file = alike / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["expert_lora"]
    file.write_text(json.dumps(config))
    logits = []
    for i, folder in enumerate((folder_of(tmp_path, attention=(), expert_lora=own), alike)):
        convert(folder, tmp_path / str(i))
        logits.append(load_adapter(tiny.base(0), tmp_path / str(i)).eval()(IDS).logits)
    assert torch.equal(*logits)


def test_notes_and_configuration_of_a_conversion(tmp_path):
    folder = folder_of(
        tmp_path, routing_strategy="mixlora-dynamic", top_p=0.7, router_aux_loss_coef=0.02, jitter_noise=0.1
    )  # fmt: skip
    done = convert(folder, tmp_path / "out")
    assert [note for note in done.notes if "jitter_noise=0.1 is ignored" in note]
    assert [note for note in done.notes if "act_fn='silu' is ignored" in note]
    ffn, lora = (a["config"] for a in adapter_info(tmp_path / "out")["adapters"])
    assert (ffn.placement, ffn.top_p, ffn.top_k, ffn.normalizes) == ("ffn", 0.7, E, False)
    assert ffn.balance_coef == pytest.approx(0.02 * E) and ffn.target_modules == tuple(SIZES)
    assert (lora.placement, lora.num_experts, lora.r, lora.alpha) == ("linear", 1, 3, 6.0)
    model = load_adapter(tiny.base(0), tmp_path / "out")
    assert sorted(injected(model))[:3] == [
        "model.layers.0.mlp", "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"routing_strategy": "mixlora-switch"}, "routing_strategy='mixlora-switch'"),
        ({"expert_lora": {"use_dora": True}}, "expert_lora.use_dora=True"),
        ({"expert_lora": [1]}, r"expert_lora=\[1\]"),
        ({"expert_capacity": 32}, "expert_capacity=32"),
        ({"num_experts": 5}, "expected 5 experts, got missing"),
        ({"num_experts": "5"}, r"num_experts: expected an integer in \[1, 4096\], got '5'"),
        ({"r": 4}, r"expected \(4, D_in\)"),
    ],
    ids=str,
)
def test_unknown_fields_are_refused_by_name(change, message, tmp_path):
    folder = folder_of(tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key, message",
    [
        ("mixlora.layers.0.mlp.noise", "tensor 'mixlora.layers.0.mlp.noise'"),
        ("mixlora.layers.0.mlp.up_proj.experts.4.lora_A.weight", "more .*up_proj.experts.4.lora_A"),
        ("mixlora.layers.0.self_attn.v_proj.lora_A.weight", "expected lora_A and lora_B"),
    ],
)
def test_unknown_tensors_are_refused_by_name(key, message, tmp_path):
    folder = folder_of(tmp_path)
    tensors = torch.load(folder / "adapter_model.bin")
    torch.save(tensors | {key: torch.zeros(3, D)}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")


def test_linear_maps_that_make_no_ffn(tmp_path):
    folder = folder_of(tmp_path)
    tensors = torch.load(folder / "adapter_model.bin")
    for key in tensors:
        if ".down_proj." in key and "lora_A" in key:
            tensors[key] = torch.zeros(3, F + 1)
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="expected linear layers of an FFN"):
        convert(folder, tmp_path / "out")
