"""PEFT folders with target_parameters: read and written bit for bit as in PEFT, and refusals."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    LoraMoeExperts,
    LoraMoeLinear,
    convert,
    from_peft,
    inject,
    injected,
    load_adapter,
    remove,
    save_adapter,
    to_peft,
)
from lora_moe.peft_experts import columns_of, rows_of

from ..support.models import moes

every_family = pytest.mark.parametrize("family", moes.FAMILIES)
TOKENS, WEIGHTS, CONFIG = moes.TOKENS, "adapter_model.safetensors", "adapter_config.json"


def trained_by_peft(folder, family="Mixtral", dtype=torch.float32, **fields):
    """Saves a nonzero LoRA with PEFT; returns its logits."""
    lora = {"r": 3, "lora_alpha": 5, "target_parameters": list(moes.TARGETS), "target_modules": []}
    model = get_peft_model(moes.base(family).to(dtype), LoraConfig(**lora | fields))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model(TOKENS).logits


def test_layout_is_peft_s():
    """The expert index is slowest in our rows and fastest in PEFT's columns; the conversions are inverse."""
    rows = torch.arange(moes.E * 3 * 5.0).reshape(moes.E * 3, 5)
    assert torch.equal(columns_of(rows, moes.E), moes.as_peft_has(rows))
    assert torch.equal(rows_of(moes.as_peft_has(rows), moes.E), rows)


@every_family
@pytest.mark.parametrize("read", [load_adapter, lambda model, folder: from_peft(model, [folder])])
def test_from_peft_and_back_bit_for_bit(family, read, tmp_path):
    expected = trained_by_peft(tmp_path / "theirs", family, use_rslora=True)
    model = read(moes.base(family), tmp_path / "theirs")
    assert {type(layer) for layer in injected(model).values()} == {LoraMoeExperts}
    assert (model(TOKENS).logits - expected).abs().max() < 1e-5
    assert to_peft(model, tmp_path / "ours") == [tmp_path / "ours"]
    same_folders(tmp_path)


def same_folders(folder):
    theirs, ours = (load_file(folder / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype and torch.equal(value, ours[key]), key
    read = [json.loads((folder / name / CONFIG).read_text()) for name in ("theirs", "ours")]
    assert read[0] == read[1]


@every_family
def test_to_peft_loads_in_peft(family, tmp_path):
    """A model that was not loaded from PEFT."""
    model = moes.ours(family)
    expected = model(TOKENS).logits
    to_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(moes.base_of(model), tmp_path)
    assert (theirs(TOKENS).logits - expected).abs().max() < 1e-5
    for path, layer in injected(model).items():
        for name, wrapper in moes.wrappers_of(theirs, path).items():
            A, B = (getattr(layer, f"lora_{letter}_{name}") for letter in "AB")
            assert torch.equal(wrapper.lora_A["default"].weight, A)
            assert torch.equal(wrapper.lora_B["default"].weight, moes.as_peft_has(B))
    said = json.loads((tmp_path / CONFIG).read_text())
    assert said["target_parameters"] == sorted(moes.TARGETS) and said["target_modules"] == []


def test_bfloat16_in_and_out(tmp_path):
    trained_by_peft(tmp_path / "theirs", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "theirs" / WEIGHTS)
    save_file({k: v.bfloat16() for k, v in weights.items()}, tmp_path / "theirs" / WEIGHTS)
    model = load_adapter(moes.base().bfloat16(), tmp_path / "theirs")
    assert next(iter(injected(model).values())).lora_A_down_proj.dtype == torch.float32
    to_peft(model, tmp_path / "ours")
    same_folders(tmp_path)


def test_plain_loras_beside_keep_working(tmp_path):
    """LoRAs on linear modules in the same file become banks of one and are written back unchanged."""
    expected = trained_by_peft(tmp_path / "theirs", target_modules=["q_proj", "v_proj"])
    model = load_adapter(moes.base(), tmp_path / "theirs")
    assert not any(layer.config.has_aux_loss for layer in injected(model).values())
    kinds = [type(layer) for layer in injected(model).values()]
    assert (kinds.count(LoraMoeLinear), kinds.count(LoraMoeExperts)) == (4, 2)
    assert (model(TOKENS).logits - expected).abs().max() < 1e-5
    to_peft(model, tmp_path / "ours")
    same_folders(tmp_path)
    ids = TOKENS.clone()
    model.train()(ids, labels=ids).loss.backward()
    with torch.no_grad():  # after further training, PEFT reads the new values
        for layer in injected(model).values():
            for A, B in layer.pairs():
                A.add_(A.grad)
                B.add_(B.grad)
    to_peft(model, tmp_path / "further")
    theirs = PeftModel.from_pretrained(moes.base(), tmp_path / "further")
    assert (theirs(TOKENS).logits - model.eval()(TOKENS).logits).abs().max() < 1e-5


def test_modules_to_save_go_along(tmp_path):
    model = moes.ours(modules_to_save=("mlp.gate",))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.neg_()
    expected = model(TOKENS).logits
    to_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(moes.base(), tmp_path)
    assert (theirs(TOKENS).logits - expected).abs().max() < 1e-5


def test_one_of_two_parameters(tmp_path):
    targets = ["mlp.experts.down_proj"]
    expected = trained_by_peft(tmp_path / "theirs", target_parameters=targets)
    model = load_adapter(moes.base(), tmp_path / "theirs")
    assert (model(TOKENS).logits - expected).abs().max() < 1e-5
    to_peft(model, tmp_path / "ours")
    same_folders(tmp_path)
    assert torch.equal(remove(model)(TOKENS).logits, moes.base()(TOKENS).logits)


# --- refusals --------------------------------------------------------------------------------------


def changed(folder, name, change):
    """Changes one key of the folder's configuration, or one tensor."""
    if name == CONFIG:
        said = json.loads((folder / CONFIG).read_text())
        change(said)
        (folder / CONFIG).write_text(json.dumps(said))
    else:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)


A_KEY = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
DAMAGED = {
    "missing": (WEIGHTS, lambda t: t.pop(A_KEY), "lora_A of gate_up_proj is missing"),
    "shape": (WEIGHTS, lambda t: t.update({A_KEY: t[A_KEY][1:].clone()}), r"expected \(12, 16\)"),
    "nan": (WEIGHTS, lambda t: t[A_KEY].fill_(float("nan")), "expected finite values"),
    "nowhere": (
        CONFIG,
        lambda c: c.update(target_parameters=["w1"]),
        r"the model has none of \['w1'\]",
    ),
    "no names": (
        CONFIG,
        lambda c: c.update(target_parameters="w1"),
        "target_parameters: expected names",
    ),
    "ranks": (CONFIG, lambda c: c.update(rank_pattern={"gate_up_proj": 6}), r"got \(12, 16\)"),
    "alphas": (CONFIG, lambda c: c.update(alpha_pattern={"down_proj": 1}), "expected one pair"),
    "dora": (CONFIG, lambda c: c.update(use_dora=True), "use_dora=True"),
    "router": (
        CONFIG,
        lambda c: c.update(target_parameters=[*moes.TARGETS, "mlp.gate.weight"]),
        "weight of a MixtralTopKRouter is a single matrix",
    ),
}


@pytest.mark.parametrize("file, change, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_folders_change_nothing(file, change, message, tmp_path):
    trained_by_peft(tmp_path)
    changed(tmp_path, file, change)
    model = moes.base()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not injected(model) and all(p.requires_grad for p in model.parameters())


HOSTILE = {
    "no parameters": (
        ("bank", "target_parameters", []),
        "expected num_experts and target_parameters",
    ),
    "no number": (("bank", "num_experts", None), "expected num_experts and target_parameters"),
    "wrong number": (("bank", "num_experts", 3), r"expected 4, the number of the model's own"),
    "token router": (("router", "kind", "token"), "expected num_experts and target_parameters"),
    "more of a router": (("router", "top_k", 2), "router"),
    "a bias": (("bank", "target_parameters", ["gate_up_proj_bias"]), "is not a fused weight of"),
    "an attribute": (("bank", "target_parameters", ["forward"]), "is not a fused weight of"),
    "a number": (("bank", "target_parameters", [3]), "target_parameters: expected module names"),
    "another place": (
        ("modules", None, ["model.layers.0.self_attn.q_proj"]),
        "has no experts with",
    ),
}


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_descriptions_change_nothing(change, message, tmp_path):
    save_adapter(moes.ours(), tmp_path)
    file = tmp_path / "lora_moe.safetensors"
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["lora_moe"])
    section, field, value = change
    (adapter,) = described["adapters"]
    if field is None:
        adapter[section] = value
    else:
        adapter[section][field] = value
    save_file(load_file(file), file, {"format": "pt", "lora_moe": json.dumps(described)})
    model = moes.base()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not injected(model) and all(p.requires_grad for p in model.parameters())


def test_what_has_no_place_is_refused(tmp_path):
    trained_by_peft(tmp_path)
    with pytest.raises(ValueError, match="expected a plain LoRA with other"):
        from_peft(moes.base(), [tmp_path, tmp_path])
    with pytest.raises(ValueError, match="expected a model without experts for a PEFT adapter"):
        load_adapter(moes.ours(), tmp_path)
    with pytest.raises(ValueError, match="got target_parameters, which need the model"):
        convert.convert(tmp_path, tmp_path / "out")
    save_adapter(moes.ours(), tmp_path / "native")
    with pytest.raises(
        ValueError, match="expected experts on linear modules, got LoRAs on a model's"
    ):
        convert.convert(tmp_path / "native", tmp_path / "out")
    with pytest.raises(ValueError, match="gate: expected 'softmax' with target_parameters"):
        from_peft(moes.base(), [tmp_path], router={"gate": "sigmoid"})
    with pytest.raises(ValueError, match="experts: expected None, as LoRAs on the model's own"):
        to_peft(moes.ours(), tmp_path / "out", experts=[0])
    with pytest.raises(ValueError, match=r"expected one r for all experts of model\.layers\.0"):
        to_peft(moes.ours(num_experts=4, r=(1, 2, 2, 2)), tmp_path / "out")
    mixed = inject(moes.ours(), LoraMoeConfig(num_experts=3, target_modules=("q_proj",)))
    with pytest.raises(ValueError, match="expected one expert per linear module together with"):
        to_peft(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
