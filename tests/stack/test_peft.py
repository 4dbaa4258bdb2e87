"""The mixture as a PEFT method: everything a PEFT user does, on tiny models."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import lora_moe

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers as hf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PeftType, get_peft_model

from lora_moe.peft import MoeLoraConfig, MoeLoraLinear, MoeLoraModel, registration

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
TARGETS = ["q_proj", "up_proj"]


def llama(kind=hf.LlamaForCausalLM, **fields):
    """The same weights at each call, drawn wide."""
    torch.manual_seed(1)
    model = kind(hf.LlamaConfig(**SIZES | fields))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def config(**fields):
    defaults = {"num_experts": 4, "r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return MoeLoraConfig(**defaults | fields)


def drawn(model, seed=2):
    """Values that matter in whatever trains: the experts of the active adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(seed=2, **fields):
    return drawn(get_peft_model(llama(), config(**fields)), seed)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


# --- PEFT knows the method -------------------------------------------------------------------------


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
    with pytest.raises(ImportError, match=r"expected PEFT 0\.\d+ or later, got 0\.9\.0"):
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


# --- configuration -----------------------------------------------------------------------------------


def test_every_field_of_a_mixture_has_its_name_in_peft():
    """A new field of LoraMoeConfig must come here, into MoeLoraConfig and into peft_moe."""
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
        with pytest.raises(ValueError, match=rf"got {named}, for lora_moe\.inject alone"):
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
        ({"mixture": lora_moe.LoraMoeConfig(r=5)}, r"r: expected mixture's 5 or nothing, got 3"),
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


# --- training and calls ------------------------------------------------------------------------------


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


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def test_a_module_under_two_names_gets_experts_under_both():
    model = drawn(get_peft_model(Twice(), config(target_modules=["first"], task_type=None)))
    assert isinstance(model.base_model.model.second, MoeLoraLinear)
    x = torch.ones(1, 8)
    layer = model.base_model.model.first
    assert torch.equal(model(x), layer(layer(x)))
    assert torch.equal(model.unload()(x), Twice()(x))


def test_samples_of_several_adapters_in_one_batch_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="adapter_names: expected none"):
        model(input_ids=IDS, adapter_names=["default", "default"])


# --- named adapters ------------------------------------------------------------------------------------


def test_switching_two_adapters():
    model = adapted(seed=2)
    model.add_adapter("other", config(num_experts=2, r=[1, 5], top_k=1, target_modules=["v_proj"]))
    first = logits(model)
    model.set_adapter("other")
    drawn(model, seed=3)
    second = logits(model)
    assert not torch.equal(first, second)
    for name, expected in (("default", first), ("other", second)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_moe_experts.other." in name for name in names)

    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name in model.state_dict())


def test_functions_address_the_active_adapter():
    model = adapted()
    model.add_adapter("other", config(num_experts=2, top_k=1, target_modules=["v_proj"]))
    logits(model)
    assert {p.rsplit(".")[-1] for p in lora_moe.router_stats(model)} == {"q_proj", "up_proj"}
    model.set_adapter("other")
    drawn(model, seed=3)
    model.train()
    with lora_moe.use_routing(model, task_ids=torch.tensor([0, 1])):
        by_task = model(input_ids=IDS).logits
    model(input_ids=IDS)
    stats = lora_moe.router_stats(model)
    assert {p.rsplit(".")[-1] for p in stats} == {"v_proj"}
    assert all(len(s["load"]) == 2 for s in stats.values())
    assert lora_moe.aux_loss(model).requires_grad
    with lora_moe.use_routing(model, task_ids=torch.tensor([0, 0])):
        assert torch.equal(model(input_ids=IDS).logits[0], by_task[0])
    lora_moe.freeze_experts(model, [1])
    frozen = {m.adapter_name: m.frozen for m in model.modules() if hasattr(m, "adapter_name")}
    assert frozen == {"default": (), "other": (1,)}


def test_two_active_adapters_add_up():
    model = adapted()
    model.add_adapter("other", config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    drawn(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 32)
    one, two = (layer.lora_moe_experts[name] for name in ("default", "other"))
    base = layer.base_layer(x)
    assert torch.allclose(layer(x), one(x, base) + two(x, base) - base, atol=1e-5)
    assert len(lora_moe.injected(model)) == 6


def test_the_base_alone_is_one_block_away():
    model, base = adapted(), logits(llama())
    with_experts = logits(model)
    assert not torch.equal(with_experts, base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no word about idle experts
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        with lora_moe.disable_adapters(model):
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_experts)


def test_a_mixture_is_not_merged_but_unloads():
    model = adapted()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"picks its experts for each token.*cannot be merged"):
            merge()
    with pytest.raises(ValueError, match="got PEFT's; call the PEFT model's unload"):
        lora_moe.remove(model)
    base = model.unload()
    assert torch.equal(logits(base), logits(llama()))
    assert base.state_dict().keys() == llama().state_dict().keys()
    assert not base._forward_pre_hooks and "generate" not in vars(base)


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["whole", "by-meta"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": [1, 2, 3, 4], "lora_alpha": [1.0, 2.0, 3.0, 4.0], "use_rslora": True},
        {"shared_a": True, "router_bias": True, "selection_bias": True, "temperature": 0.5},
        {"gate": "sigmoid", "renormalize": False, "threshold": 0.4, "rank_pattern": {"q_proj": 2}},
        {"top_k": 1, "target_modules": r".*layers\.0.*(k|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "top_p": 0.5},
    ],
    ids=["plain", "unequal", "biases", "sigmoid", "expression", "all-linear"],
)  # fmt: skip
def test_the_same_logits_after_saving_and_loading(tmp_path, fields, low_cpu_mem_usage):
    model = adapted(**fields)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].to_dict() | {"inference_mode": False} == (
        model.peft_config["default"].to_dict()
    )
    assert not any(p.requires_grad for p in loaded.parameters())
    trains = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trains.parameters())


def test_a_bf16_base_loads_fp32_experts_without_rounding(tmp_path):
    model = drawn(get_peft_model(llama().to(torch.bfloat16), config()))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        base = llama().to(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), logits(model))


def test_named_adapters_are_saved_and_loaded_each(tmp_path):
    model = adapted()
    model.add_adapter("other", config(num_experts=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    drawn(model, seed=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "other", adapter_name="renamed")
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "first")
    loaded.set_adapter("first")
    model.set_adapter("default")
    assert torch.equal(logits(loaded), logits(model))
    assert "import lora_moe.peft" in (tmp_path / "other/README.md").read_text()


def test_auto_peft_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = drawn(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_adapter_methods(tmp_path):
    model = llama()
    model.add_adapter(config(), "one")
    model.add_adapter(config(num_experts=2, target_modules=["v_proj"]), "two")
    assert torch.equal(logits(model), logits(llama()))
    drawn(model)
    model.set_adapter("one")
    drawn(model, seed=3)
    expected = logits(model)
    assert model.active_adapters() == ["one"]
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "lora_moe.safetensors").exists()

    loaded = llama()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(llama()))
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), logits(llama()))


def test_frozen_experts_are_saved(tmp_path):
    model = adapted()
    lora_moe.freeze_experts(model, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert {layer.frozen for layer in lora_moe.injected(loaded).values()} == {(0, 2)}
    next(iter(lora_moe.injected(model).values())).frozen = (1,)
    with pytest.raises(ValueError, match="frozen: expected the same experts in every layer"):
        model.save_pretrained(tmp_path)


def classifier():
    return llama(hf.LlamaForSequenceClassification, num_labels=3)


@pytest.mark.parametrize("fields", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_modules_to_save(tmp_path, fields):
    model = drawn(get_peft_model(classifier(), config(**{"task_type": None} | fields)))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "score" in n]
    assert trained == ["base_model.model.score.modules_to_save.default.weight"]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(classifier()))
    kept = pytest.raises(ValueError, match=r"score \(modules_to_save\) has its base kept by PEFT")
    with kept, lora_moe.disable_adapters(model):
        pass

    lora_moe.save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(lora_moe.load_adapter(classifier(), tmp_path / "ours")), expected)
    again = get_peft_model(classifier(), config(**{"task_type": None} | fields))
    assert torch.equal(logits(lora_moe.load_adapter(again, tmp_path / "ours")), expected)


def test_save_adapter_writes_the_active_adapter_for_a_bare_model(tmp_path):
    model = adapted()
    model.add_adapter("other", config(num_experts=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    drawn(model, seed=3)
    lora_moe.save_adapter(model, tmp_path)
    (group,) = lora_moe.adapter_info(tmp_path)["adapters"]
    assert group["modules"] == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    loaded = lora_moe.load_adapter(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    expected = logits(model)
    lora_moe.load_adapter(drawn(model, seed=4), tmp_path)
    assert torch.equal(logits(model), expected)


def test_copies_and_pickles_keep_their_base():
    model = adapted()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
        layer = next(m for m in copied.modules() if isinstance(m, MoeLoraLinear))
        assert layer.lora_moe_experts["default"].base_layer is layer.base_layer


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


def test_transformers_trainer_saves_and_resumes(tmp_path):
    pytest.importorskip("accelerate")

    class Balanced(hf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return outputs.loss + lora_moe.aux_loss(model)

    def trainer(steps):
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, seed=0,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        return Balanced(adapted(), arguments, train_dataset=data)

    whole = trainer(4)
    whole.train()
    trained = logits(whole.model)
    assert not torch.equal(trained, logits(adapted()))
    saved = tmp_path / "checkpoint-4"
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), saved)), trained)
    assert not (saved / "model.safetensors").exists()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model), trained)


def test_a_layer_compiles_to_one_graph():
    layer = adapted().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()
