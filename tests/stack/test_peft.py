"""The mixture as a PEFT method: the usual PEFT workflows on tiny models."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from peft import LoraConfig, PeftModel, PeftType, get_peft_model

import lora_moe
from lora_moe.peft import MoeLoraConfig, MoeLoraLinear, MoeLoraModel, registration

from ..support.peft_mixtures import IDS, Twice, adapted, config, drawn, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_the_enum_has_a_member_like_its_own():
    member = PeftType.LORA_MOE
    assert PeftType("LORA_MOE") is PeftType["LORA_MOE"] is member
    assert member in list(PeftType) and list(PeftType).count(member) == 1
    assert (member.name, member.value, member) == ("LORA_MOE", "LORA_MOE", "LORA_MOE")
    assert pickle.loads(pickle.dumps(member)) is member is copy.deepcopy(member)
    assert isinstance(member, PeftType) and len(PeftType) == len(PeftType.__members__)
    with pytest.raises(AttributeError):
        PeftType.LORA_MOE = "another"


def test_an_old_peft_is_refused_with_what_to_do(monkeypatch):
    registration._expect_version()
    monkeypatch.setattr(registration.peft, "__version__", "0.9.0")
    with pytest.raises(ImportError, match=r"requires PEFT 0\.\d+ or later, got 0\.9\.0"):
        registration._expect_version()


def test_importing_the_package_again_registers_once():
    registration.register(MoeLoraConfig, MoeLoraModel)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA_MOE] is MoeLoraConfig


def test_a_process_without_us_gets_pefts_error_and_the_readme_says_what_to_import(tmp_path):
    adapted().save_pretrained(tmp_path)
    read = "from peft import PeftConfig; print(PeftConfig.from_pretrained({!r}).num_experts)"
    outcomes = [
        subprocess.run(
            [sys.executable, "-c", before + read.format(str(tmp_path))],
            capture_output=True, text=True,
        )
        for before in ("", "import lora_moe.peft; ")
    ]  # fmt: skip
    assert outcomes[0].returncode != 0 and "KeyError: 'LORA_MOE'" in outcomes[0].stderr
    assert outcomes[1].stdout.strip() == "4", outcomes[1].stderr
    readme = (tmp_path / "README.md").read_text()
    assert "import lora_moe.peft" in readme and "KeyError: 'LORA_MOE'" in readme
    assert readme.startswith("---")  # PEFT's model card is still there

    PeftModel.from_pretrained(llama(), tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("## Loading this adapter") == 1


def test_every_field_of_a_mixture_has_its_name_in_peft():
    """A new field of LoraMoeConfig must be added here, to MoeLoraConfig and to peft_moe."""
    from lora_moe import peft_moe

    ours = {field.name for field in dataclasses.fields(lora_moe.LoraMoeConfig)}
    ours -= {"target_parameters", "placement"}
    own = {field.name for field in dataclasses.fields(MoeLoraConfig)}
    assert ours == {peft_moe.RENAMED.get(name, name) for name in own} & ours
    assert own == {*peft_moe._FIELDS, *peft_moe._OTHER}


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"target_parameters": ("experts.down_proj",)}, "target_parameters"),
        ({"placement": "ffn"}, "placement='ffn'"),
    ],
)
def test_other_placements_are_left_to_inject(fields, named):
    mixture = lora_moe.LoraMoeConfig(**fields)
    for given in (mixture, mixture.to_dict()):
        with pytest.raises(ValueError, match=rf"got {named}, which only lora_moe\.inject"):
            MoeLoraConfig(mixture=given)


def test_a_mixture_is_taken_over_whole():
    mixture = lora_moe.LoraMoeConfig(
        num_experts=3, r=(2, 3, 4), alpha=(8, 9, 10), top_k=1, gate="sigmoid", dropout=0.25,
        target_modules=("q_proj",), balance_coef=0.5, adapter_dtype=torch.bfloat16,
    )  # fmt: skip
    for given in (mixture, mixture.to_dict()):
        made = MoeLoraConfig(mixture=given)
        assert (made.r, made.lora_alpha, made.lora_dropout) == ([2, 3, 4], [8, 9, 10], 0.25)
        assert made.at("model.q_proj") == mixture
    layer = get_peft_model(llama(), MoeLoraConfig(mixture=mixture)).base_model.model
    assert lora_moe.injected(layer)["model.layers.1.self_attn.q_proj"].config == mixture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r: expected an integer in \[1, 1024\], got 0"),
        ({"lora_alpha": -1.0}, r"lora_alpha: expected a number in \[0, 1e\+06\], got -1.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a probability"),
        ({"r": [1, 2]}, r"r: expected one rank for each of 4 experts"),
        ({"top_k": 5}, r"top_k: expected an integer in \[1, 4\], got 5"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: expected an integer"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]: expected a number"),
        ({"mixture": lora_moe.LoraMoeConfig(r=5)}, r"r: expected mixture's 5 or no value, got 3"),
        ({"mixture": "mixtral"}, r"mixture: expected a LoraMoeConfig or a dict of its fields, got str"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, r"layers_to_transform: expected None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_pefts_names(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_patterns_and_layers_decide_by_module():
    model = get_peft_model(
        llama(),
        config(
            rank_pattern={r"layers\.1\..*q_proj": [1, 2, 3, 4], "up_proj": 5},
            alpha_pattern={"up_proj": 7},
        ),
    )
    configs = {
        p.removeprefix("base_model.model."): m.config for p, m in lora_moe.injected(model).items()
    }
    assert configs["model.layers.0.self_attn.q_proj"].ranks == (3, 3, 3, 3)
    assert configs["model.layers.1.self_attn.q_proj"].ranks == (1, 2, 3, 4)
    assert configs["model.layers.1.mlp.up_proj"].ranks == (5,) * 4
    assert configs["model.layers.1.mlp.up_proj"].alpha == 7
    only = get_peft_model(llama(), config(layers_to_transform=[1]))
    assert all("layers.1." in path for path in lora_moe.injected(only))


def test_targets_default_to_what_peft_takes_for_the_model():
    model = get_peft_model(llama(), config(target_modules=None))
    assert {path.rsplit(".")[-1] for path in lora_moe.injected(model)} == {"q_proj", "v_proj"}


def test_all_linear_is_what_inject_takes_also_for_a_second_adapter():
    every_linear = lora_moe.LoraMoeConfig(target_modules="all-linear")
    every = set(lora_moe.injected(lora_moe.inject(llama(), every_linear)))
    model = get_peft_model(llama(), config(target_modules=["q_proj"]))
    model.add_adapter("all", config(target_modules="all-linear"))
    model.set_adapter("all")
    assert set(lora_moe.injected(model.get_base_model())) == every


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["up_proj", "input_layernorm"]])
def test_an_unfit_target_is_refused_and_the_model_is_as_it_was(targets):
    model = llama()
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(
        ValueError, match=f"target_modules: expected linear modules, got .*{targets[1]}"
    ):
        get_peft_model(model, config(target_modules=targets))
    assert {name: id(m) for name, m in model.named_modules()} == before


def test_starts_as_the_base_and_trains_the_experts_alone():
    model = get_peft_model(llama(), config())
    assert torch.equal(logits(model), logits(llama()))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_moe_experts.default." in name for name in trained)
    assert len(trained) == 3 * len(lora_moe.injected(model)) == 12


def test_equals_inject_bit_for_bit():
    model = adapted()
    plain = lora_moe.inject(llama(), config().at(""))
    for path, layer in lora_moe.injected(model.get_base_model()).items():
        lora_moe.injected(plain)[path].load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(logits(model), logits(plain))


def test_gradients_are_the_same_under_gradient_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        model = adapted().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=IDS, labels=IDS).loss + lora_moe.aux_loss(model)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, gradients[1][name]), name


def test_padding_counts_nowhere_in_aux_loss():
    model, mask = adapted(), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    model(input_ids=IDS, attention_mask=mask)
    padded = lora_moe.router_stats(model)
    other = torch.where(mask == 1, IDS, 5)
    model(input_ids=other, attention_mask=mask)
    for path, stats in lora_moe.router_stats(model).items():
        assert torch.equal(stats["load"], padded[path]["load"])
        assert stats["entropy"] == padded[path]["entropy"]


def test_generate_and_a_bf16_base():
    model = drawn(get_peft_model(llama().to(torch.bfloat16), config()))
    layer = next(iter(lora_moe.injected(model).values()))
    assert layer.lora_A.dtype == layer.router_weight.dtype == torch.float32
    made = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    tokens = IDS
    for _ in range(4):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, tokens)


def test_dtypes_are_as_peft_and_the_configuration_say():
    def dtypes(autocast, **fields):
        model = get_peft_model(
            llama().to(torch.bfloat16), config(**fields), autocast_adapter_dtype=autocast
        )
        layer = next(iter(lora_moe.injected(model).values()))
        return layer.lora_A.dtype, layer.lora_B.dtype, layer.router_weight.dtype

    fp32, bf16 = torch.float32, torch.bfloat16
    assert dtypes(True) == (fp32, fp32, fp32)
    assert dtypes(False) == (bf16, bf16, fp32)
    assert dtypes(True, adapter_dtype="bfloat16") == (bf16, bf16, fp32)
    assert dtypes(False, adapter_dtype="float32") == (fp32, fp32, fp32)


def test_a_module_under_two_names_gets_experts_under_both():
    model = drawn(get_peft_model(Twice(), config(target_modules=["first"], task_type=None)))
    assert isinstance(model.base_model.model.second, MoeLoraLinear)
    x = torch.ones(1, 8)
    layer = model.base_model.model.first
    assert torch.equal(model(x), layer(layer(x)))
    assert torch.equal(model.unload()(x), Twice()(x))


def test_peft_and_inject_keep_off_each_other():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT has adapted it"):
        lora_moe.inject(model, lora_moe.LoraMoeConfig(target_modules=("q_proj",)))
    model = adapted()
    with pytest.raises(ValueError, match="PEFT has adapted it"):
        lora_moe.inject(model, lora_moe.LoraMoeConfig(target_modules=("q_proj",)))
    with pytest.raises(ValueError, match="already has experts"):
        get_peft_model(
            lora_moe.inject(llama(), lora_moe.LoraMoeConfig(target_modules=("q_proj",))), config()
        )


@pytest.mark.parametrize(
    "ids", [[0.5], [0, 1.5], [float("inf")], [True], [4], [-1], "all"], ids=str
)
def test_what_is_no_expert_is_not_frozen(ids):
    model = adapted()
    lora_moe.freeze_experts(model, [2])
    with pytest.raises(ValueError, match=r"expected expert ids in \[0, 4\)"):
        lora_moe.freeze_experts(model, ids)
    assert {layer.frozen for layer in lora_moe.injected(model).values()} == {(2,)}


def test_a_layer_compiles_to_one_graph():
    layer = adapted().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()
