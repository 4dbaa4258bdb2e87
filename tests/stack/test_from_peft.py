"""PEFT's LoRAs as one bank of experts, and each expert as a LoRA of PEFT again."""

from __future__ import annotations

import json
import os
import time
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_moe
from lora_moe import LoraMoeConfig, from_peft, injected, to_peft, use_routing

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers as hf
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from ..support.compare import relative_error
from .test_peft import IDS, Twice, llama, logits

FILES = ["adapter_config.json", "adapter_model.safetensors"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# unequal in every way that a bank can hold
TASKS = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 6, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    {
        "r": 3, "lora_alpha": 16, "target_modules": ALL,
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 1},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 2, "(up|down)_proj": 7},
    },
]  # fmt: skip


def lora(seed=0, base=llama, **fields):
    """A model with a LoRA that matters."""
    model = get_peft_model(base(), LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | fields))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(folder, tasks=TASKS, **kwargs):
    """[(directory, logits by PEFT)]"""
    pairs = []
    for i, fields in enumerate(tasks):
        model = lora(seed=i, **kwargs, **fields)
        model.save_pretrained(folder / str(i))
        pairs.append((folder / str(i), logits(model)))
    return pairs


def same(ours, pefts):
    """Logits within 1e-5 of PEFT's; measured 3e-6 where all linears of both layers have a LoRA."""
    error = relative_error(ours.detach(), pefts.detach())
    assert error <= 1e-5, error


@torch.no_grad()
def by_task(model, task):
    with use_routing(model, task_ids=torch.full((len(IDS),), task)):
        return model(input_ids=IDS).logits


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewritten(folder, tensors=lambda t: t, **fields):
    """Change a saved adapter's fields and tensors."""
    config = json.loads((folder / FILES[0]).read_text())
    (folder / FILES[0]).write_text(json.dumps(config | fields))
    state = tensors(safetensors.torch.load_file(folder / FILES[1]))
    safetensors.torch.save_file(state, folder / FILES[1], {"format": "pt"})
    return folder


# --- PEFT to us ------------------------------------------------------------------------------------


def test_each_tasks_logits_are_pefts(tmp_path):
    pairs = saved(tmp_path)
    model = from_peft(llama(), [path for path, _ in pairs], top_k=2)
    base = logits(llama())
    for task, (_, expected) in enumerate(pairs):
        assert (expected - base).abs().max() > 0.1  # the LoRA has a say
        same(by_task(model, task), expected)
    assert torch.equal(by_task(model, -1), base)
    mixed = torch.stack([expected[i % 2] for i, (_, expected) in enumerate(pairs[:2])])
    with torch.no_grad(), use_routing(model, task_ids=torch.tensor([0, 1])):
        same(model(input_ids=IDS).logits, mixed)


def test_ranks_scales_and_places_are_the_adapters(tmp_path):
    model = from_peft(llama(), [path for path, _ in saved(tmp_path)])
    layers = injected(model)
    assert len(layers) == 14
    q = layers["model.layers.0.self_attn.q_proj"]
    assert q.config.ranks == (4, 6, 5)
    assert q.scales == pytest.approx((2, 5 / 6**0.5, 16 / 5), rel=1e-15)
    down = layers["model.layers.1.mlp.down_proj"]
    assert down.config.ranks == (1, 1, 1) and down.scales[2] == 7
    assert not down.lora_B[:2].any() and down.lora_A.any()
    trained = {name.rsplit(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "router_weight"}


def test_state_dicts_with_their_configuration(tmp_path):
    models = [lora(seed=i, **fields) for i, fields in enumerate(TASKS)]
    pairs = [(get_peft_model_state_dict(m), m.peft_config["default"]) for m in models]
    plain = [
        {k.removeprefix("base_model.model."): v for k, v in state.items()} for state, _ in pairs
    ]
    pairs[1] = plain[1], pairs[1][1].to_dict()
    model = from_peft(llama(), pairs)
    for task, expected in enumerate(map(logits, models)):
        same(by_task(model, task), expected)
    with pytest.raises(ValueError, match=r"adapters\[1\]: expected a directory or a pair"):
        from_peft(llama(), [pairs[0], pairs[1][0]])


def test_the_router_trains_and_is_as_asked_for(tmp_path):
    paths = [path for path, _ in saved(tmp_path)]
    model = from_peft(llama(), paths, top_k=1, router={"gate": "sigmoid", "router_bias": True})
    config = injected(model)["model.layers.0.mlp.up_proj"].config
    assert (config.top_k, config.gate, config.router_bias) == (1, "sigmoid", True)
    like = LoraMoeConfig(gate="sigmoid", router_bias=True, dropout=0.1)
    config = injected(from_peft(llama(), paths, router=like))["model.layers.0.mlp.up_proj"].config
    assert (config.gate, config.dropout, config.num_experts, config.top_k) == ("sigmoid", 0.1, 3, 2)
    (model(input_ids=IDS, labels=IDS).loss + lora_moe.aux_loss(model)).backward()
    assert all(layer.router_weight.grad.any() for layer in injected(model).values())


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_families(tmp_path, family):
    def base():
        torch.manual_seed(0)
        if family == "gpt2":
            return hf.GPT2LMHeadModel(
                hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40)
            ).eval()
        return hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=40, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                decoder_start_token_id=0,
            )
        ).eval()  # fmt: skip

    batch = {"input_ids": IDS} | ({"labels": IDS} if family == "t5" else {})
    targets = [["c_attn", "c_proj"], ["c_attn"]] if family == "gpt2" else [["q", "wo"], ["v"]]
    expected = []
    for i, names in enumerate(targets):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out
            model = lora(seed=i, base=base, target_modules=names)
        model.save_pretrained(tmp_path / str(i))
        expected.append(model(**batch).logits)
    model = from_peft(base(), [tmp_path / "0", tmp_path / "1"])
    for task, value in enumerate(expected):
        with use_routing(model, task_ids=torch.full((2,), task)):
            same(model(**batch).logits, value)
    for folder, original in zip(to_peft(model, tmp_path / "out"), ("0", "1")):
        assert files(folder) == {n: (tmp_path / original / n).read_bytes() for n in FILES}


# --- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_are_equal_bit_for_bit_after_the_round_trip(tmp_path, dtype):
    paths = [path for path, _ in saved(tmp_path)]
    for path in paths[:2]:  # the third stays fp32: dtypes are each adapter's own
        rewritten(path, lambda state: {k: v.to(dtype) for k, v in state.items()})
    model = from_peft(llama(), paths)
    folders = to_peft(model, tmp_path / "out")
    assert folders == [tmp_path / "out" / f"expert_{e}" for e in range(3)]
    assert sorted(os.listdir(tmp_path / "out")) == ["expert_0", "expert_1", "expert_2"]
    for folder, path in zip(folders, paths):
        assert files(folder)[FILES[1]] == files(path)[FILES[1]]
        assert sorted(files(folder)) == FILES
        assert json.loads(files(folder)[FILES[0]]) == json.loads(files(path)[FILES[0]])


def test_a_trained_expert_is_not_rounded_to_what_it_came_from(tmp_path):
    ((path, _),) = saved(tmp_path, TASKS[:1])
    rewritten(path, lambda state: {k: v.to(torch.bfloat16) for k, v in state.items()})
    model = from_peft(llama(), [path])
    layer = injected(model)["model.layers.1.self_attn.v_proj"]
    with torch.no_grad():
        layer.lora_B[0, 0] += 1e-4
    (folder,) = to_peft(model, tmp_path / "out")
    state = safetensors.torch.load_file(folder / FILES[1])
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    assert state[key].dtype == torch.float32 and torch.equal(state[key], layer.lora_B.T)
    assert state[key.replace("lora_B", "lora_A")].dtype == torch.bfloat16


def test_an_expert_that_learned_where_its_adapter_had_nothing_keeps_it(tmp_path):
    model = from_peft(llama(), [path for path, _ in saved(tmp_path)])
    with torch.no_grad():
        injected(model)["model.layers.1.mlp.down_proj"].lora_B.normal_()
    folders = to_peft(model, tmp_path / "out")
    for task, folder in enumerate(folders):
        loaded = PeftModel.from_pretrained(llama(), folder)
        same(logits(loaded), by_task(model, task))


# --- us to PEFT --------------------------------------------------------------------------------------

BANKS = {
    "plain": {"r": 3, "alpha": 6.0},
    "unequal": {"r": (1, 4, 2), "alpha": (3.0, 2.5, 1.0), "use_rslora": True},
    "shared-a": {"r": 2, "shared_a": True},
    "one-layer": {"target_modules": r"model\.layers\.1\..*(q|up)_proj"},
    "everything": {"target_modules": "all-linear", "adapter_dtype": "bfloat16"},
}


@pytest.mark.parametrize("bank", BANKS)
def test_peft_computes_what_each_expert_does(tmp_path, bank):
    fields = {"num_experts": 3, "top_k": 2, "target_modules": ("q_proj", "up_proj")} | BANKS[bank]
    model = lora_moe.inject(llama(), LoraMoeConfig(**fields))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        assert sorted(files(folder)) == FILES
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a pattern that matches nothing
            loaded = PeftModel.from_pretrained(llama(), folder)
        expected = by_task(model, task)
        assert (expected - logits(llama())).abs().max() > 0.1
        same(logits(loaded), expected)
        merged = logits(loaded.merge_and_unload())
        assert torch.allclose(merged, expected, rtol=0, atol=1e-3)


def test_layers_of_different_ranks_and_scales(tmp_path):
    model = llama()
    groups = [(("q_proj",), (2, 3), False), ((r"model.layers.1.mlp.up_proj",), (4, 1), True)]
    for names, ranks, root in groups:
        config = LoraMoeConfig(
            num_experts=2, r=ranks, target_modules=names, use_rslora=root, alpha=5
        )
        lora_moe.inject(model, config)
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(llama(), folder)
        same(logits(loaded), by_task(model, task))
    again = from_peft(llama(), [tmp_path / "expert_0", tmp_path / "expert_1"])
    for task in range(2):
        same(by_task(again, task), by_task(model, task))


def test_a_name_inside_another_ones_path_gets_its_own_rank(tmp_path):
    """PEFT's patterns match the end of a path: "first" is the end of "inner.first", too."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.first(x))

    class Outer(Pair):
        def __init__(self):
            super().__init__()
            self.inner = Pair()

        def forward(self, x):
            return self.inner(super().forward(x))

    model = Outer()
    for names, r in ((r"first", 1), (r"inner\.first", 2), (r"second|inner\.second", 3)):
        lora_moe.inject(model, LoraMoeConfig(num_experts=2, r=r, target_modules=names))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(Outer(), folder)
        with use_routing(model, task_ids=torch.full((4,), task)):
            same(loaded(x), model(x))


def test_chosen_experts_and_nothing_beside_them(tmp_path):
    model = lora_moe.inject(llama(), LoraMoeConfig(num_experts=5, target_modules=("q_proj",)))
    assert to_peft(model, tmp_path / "a", experts=[3, 1]) == [
        tmp_path / "a/expert_1",
        tmp_path / "a/expert_3",
    ]
    assert sorted(os.listdir(tmp_path / "a")) == ["expert_1", "expert_3"]
    assert to_peft(model, tmp_path / "b", experts=4) == [tmp_path / "b/expert_4"]
    to_peft(model, tmp_path / "b", experts=4)  # over itself
    assert sorted(files(tmp_path / "b/expert_4")) == FILES
    for wrong in ([5], [-1], "all", [0.5]):
        with pytest.raises(ValueError, match=r"experts: expected expert ids in \[0, 5\)"):
            to_peft(model, tmp_path / "c", experts=wrong)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="expected one with LoraMoeLinear"):
        to_peft(llama(), tmp_path / "out")
    model = lora_moe.inject(llama(), LoraMoeConfig(num_experts=2, target_modules=("q_proj",)))
    lora_moe.inject(model, LoraMoeConfig(num_experts=3, target_modules=("up_proj",)))
    with pytest.raises(ValueError, match=r"same number of experts in each layer, got \[2, 3\]"):
        to_peft(model, tmp_path / "out")
    model = lora_moe.inject(llama(), LoraMoeConfig(num_experts=2, target_modules=("q_proj",)))
    injected(model)["model.layers.1.self_attn.q_proj"].lora_B.data[-1, -1] = float("nan")
    with pytest.raises(ValueError, match=r"expert 1: .*lora_B\.weight: expected finite values"):
        to_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_to_save_go_with_each_expert(tmp_path):
    def base():
        return llama(hf.LlamaForSequenceClassification, num_labels=3)

    config = LoraMoeConfig(num_experts=2, target_modules=("q_proj",), modules_to_save=("score",))
    model = lora_moe.inject(base(), config)
    for p in (model.score.weight, *(layer.lora_B for layer in injected(model).values())):
        nn.init.normal_(p)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(base(), folder)
        same(logits(loaded), by_task(model, task))


def test_the_active_adapter_of_a_peft_model(tmp_path):
    from lora_moe.peft import MoeLoraConfig

    model = get_peft_model(llama(), MoeLoraConfig(num_experts=2, r=2, target_modules=["q_proj"]))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(llama(), folder)
        same(logits(loaded), by_task(model, task))


# --- what is refused ---------------------------------------------------------------------------------

LOST = {
    "dora": ({"use_dora": True}, r"use_dora=True.*lora_magnitude_vector"),
    "bias": ({"bias": "all"}, r"bias='all'"),
    "lora-bias": ({"lora_bias": True}, r"lora_bias=True.*lora_B\.bias"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, r"lora_embedding_A"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\].*lm_head"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' \(it changes the base"),
    "parameters": ({"target_parameters": ["q_proj.weight"], "target_modules": []}, r"target_parameters"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOST)
def test_what_would_be_lost_is_refused_by_name(tmp_path, kind):
    fields, message = LOST[kind]
    saved(tmp_path, [{"target_modules": ["q_proj"]}, fields])
    model = llama()
    with pytest.raises(ValueError, match=rf"(?s)1: expected a plain LoRA.*{message}"):
        from_peft(model, [tmp_path / "0", tmp_path / "1"])
    assert not injected(model) and all(p.requires_grad for p in model.parameters())


def test_a_field_of_a_peft_to_come_is_refused_if_it_is_set(tmp_path):
    ((path, expected),) = saved(tmp_path, TASKS[:1])
    rewritten(path, use_newer=False, newer_config=None)
    same(by_task(from_peft(llama(), [path]), 0), expected)
    rewritten(path, use_newer=True)
    with pytest.raises(ValueError, match="use_newer=True"):
        from_peft(llama(), [path])


def test_other_methods_and_missing_files(tmp_path):
    get_peft_model(
        llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="expected peft_type 'LORA', got 'IA3'"):
        from_peft(llama(), [tmp_path / "ia3"])
    lora().save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model\.bin.*a pickle runs code and is not opened"
    ):
        from_peft(llama(), [tmp_path / "bin"])
    with pytest.raises(
        FileNotFoundError, match=r"expected adapter_model\.safetensors and adapter_config"
    ):
        from_peft(llama(), [tmp_path / "nowhere"])
    for wrong in ([], {}, str(tmp_path), tmp_path, None, 5):
        with pytest.raises(ValueError, match="adapters: expected a list of one or more"):
            from_peft(llama(), wrong)
    with pytest.raises(ValueError, match=r"adapters\[0\]: expected a directory or a pair"):
        from_peft(llama(), [5])


def without(part):
    return lambda state: {k: v for k, v in state.items() if part not in k}


def changed(part, change):
    return lambda state: {k: change(v) if part in k else v for k, v in state.items()}


def renamed(old, new):
    return lambda state: {k.replace(old, new): v for k, v in state.items()}


def as_is(state):
    return state


BAD = {
    "missing-b": (without("0.self_attn.q_proj.lora_B"), {}, r"layers\.0\..*q_proj: lora_B is missing"),
    "missing-a": (without("0.self_attn.q_proj.lora_A"), {}, r"layers\.0\..*q_proj: lora_A is missing"),
    "empty": (lambda state: {"x": torch.zeros(1)}, {}, r"tensor 'x'"),
    "wide": (changed("v_proj.lora_A", lambda t: t.repeat(1, 2)), {}, r"\(4, 32\), got \(4, 64\)"),
    "rank": (as_is, {"r": 5}, r"lora_A: expected \(5, 32\), got \(4, 32\)"),
    "rank-text": (as_is, {"r": "4"}, r"r: expected an integer in \[1, 1024\], got '4'"),
    "rank-bool": (as_is, {"r": True}, r"r: expected an integer in \[1, 1024\], got True"),
    "alpha": (as_is, {"lora_alpha": -1}, r"lora_alpha: expected a number in \[0, 1e\+06\], got -1"),
    "alpha-big": (as_is, {"lora_alpha": 1e30}, r"lora_alpha: expected a number in \[0, 1e\+06\], got 1e\+30"),
    "rslora": (as_is, {"use_rslora": "yes"}, r"use_rslora: expected a bool, got 'yes'"),
    "nan": (changed("lora_B", lambda t: t * float("nan")), {}, r"expected finite values in torch\.float32"),
    "int8": (changed("lora_B", lambda t: t.to(torch.int8)), {}, r"lora_B: expected one of .*got I8"),
    "no-module": (renamed("layers.1", "layers.7"), {}, r"layers\.7\.self_attn\.q_proj: no such module"),
    "norm": (renamed("self_attn.q_proj", "input_layernorm"), {}, r"a LlamaRMSNorm is not linear"),
    "repeated-group": (as_is, {"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern: .*no\s+repeated group"),
    "no-expression": (as_is, {"rank_pattern": {"(": 3}}, r"rank_pattern: expected a regular expression"),
    "pattern-list": (as_is, {"rank_pattern": [3]}, r"rank_pattern: expected a dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_adapter_is_refused_and_the_model_is_as_it_was(tmp_path, kind):
    tensors, fields, message = BAD[kind]
    saved(tmp_path, [TASKS[0], TASKS[0]])
    rewritten(tmp_path / "1", tensors, **fields)
    model = llama()
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        from_peft(model, [tmp_path / "0", tmp_path / "1"])
    assert time.perf_counter() - begin < 5
    assert not injected(model) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(llama()))


def test_hostile_files_are_not_opened(tmp_path):
    ((path, _),) = saved(tmp_path, TASKS[:1])
    for name in FILES:
        text = (path / name).read_bytes()
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match="a symbolic link"):
            from_peft(llama(), [path])
        (path / name).unlink()
        (path / name).write_bytes(text)
    (path / FILES[0]).write_text("[" * 10_000)
    with pytest.raises(ValueError, match="expected JSON"):
        from_peft(llama(), [path])
    (path / FILES[0]).write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        from_peft(llama(), [path])
    (path / FILES[0]).write_text(" " * (5 << 20))
    with pytest.raises(ValueError, match="expected at most"):
        from_peft(llama(), [path])


def test_unfit_models_and_routers(tmp_path):
    paths = [path for path, _ in saved(tmp_path, TASKS[:1])]
    with pytest.raises(ValueError, match="expected one without experts"):
        from_peft(lora_moe.inject(llama(), LoraMoeConfig(target_modules=("o_proj",))), paths)
    with pytest.raises(ValueError, match="PEFT has adapted it"):
        from_peft(lora(), paths)
    with torch.device("meta"):
        empty = hf.LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="the meta device"):
        from_peft(empty, paths)
    with pytest.raises(ValueError, match=r"router: expected some of .*got \['r'\]"):
        from_peft(llama(), paths, router={"r": 3})
    with pytest.raises(ValueError, match="router: expected a dict"):
        from_peft(llama(), paths, router="token")
    with pytest.raises(ValueError, match="top_k: expected an integer"):
        from_peft(llama(), paths, top_k=2)


def test_a_module_of_two_names_is_refused_both_ways(tmp_path):
    """PEFT adapts the first name alone, experts serve both: the function would be another one."""
    get_peft_model(Twice(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(
        ValueError, match="first: it has the names first, second, of which PEFT adapts one"
    ):
        from_peft(Twice(), [tmp_path / "lora"])
    model = lora_moe.inject(Twice(), LoraMoeConfig(target_modules=("first",)))
    with pytest.raises(
        ValueError, match=r"modules of one name.*first \(it has the names first, second\)"
    ):
        to_peft(model, tmp_path / "out")
    layer = lora_moe.LoraMoeLinear(nn.Linear(4, 4), LoraMoeConfig())
    with pytest.raises(ValueError, match="expected a module that holds LoraMoeLinear, got one"):
        to_peft(layer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_iterable_of_adapters(tmp_path):
    paths = [path for path, _ in saved(tmp_path, TASKS[:2])]
    model = from_peft(llama(), (str(path) for path in paths))
    assert {layer.config.num_experts for layer in injected(model).values()} == {2}


def test_modules_to_save_of_the_new_bank(tmp_path):
    paths = [path for path, _ in saved(tmp_path, TASKS[:2])]
    for router in ({"modules_to_save": ["lm_head"]}, LoraMoeConfig(modules_to_save=("lm_head",))):
        model = from_peft(llama(), paths, router=router)
        trained = {n for n, p in model.named_parameters() if p.requires_grad and "q_proj" not in n}
        assert "lm_head.weight" in trained and "model.embed_tokens.weight" not in trained
    nn.init.normal_(model.lm_head.weight)
    lora_moe.save_adapter(model, tmp_path / "out")
    assert torch.equal(logits(lora_moe.load_adapter(llama(), tmp_path / "out")), logits(model))
    for names, message in ((["mlp"], r"without a LoRA, got .*up_proj"), (["nothing"], "'nothing'")):
        model = llama()
        with pytest.raises(ValueError, match=f"modules_to_save: expected modules .*{message}"):
            from_peft(model, paths, router={"modules_to_save": names})
        assert not injected(model)


def test_weights_that_an_adapter_lacks_are_told(tmp_path):
    lora(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "whole")
    tensors = safetensors.torch.load_file(tmp_path / "whole" / FILES[1])
    short = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    config = json.loads((tmp_path / "whole" / FILES[0]).read_text())
    with pytest.warns(
        UserWarning, match=r"adapters\[1\].*no weights for 2 of 4 modules.*adds zero"
    ):
        from_peft(llama(), [(tensors, config), (short, config)])
    with warnings.catch_warnings():  # one layer is what the configuration asks for
        warnings.simplefilter("error", UserWarning)
        from_peft(llama(), [(short, config | {"layers_to_transform": [0]})])
        from_peft(llama(), [(tensors, config)])
