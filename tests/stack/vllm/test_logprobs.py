"""Log-probabilities of vLLM against transformers + lora_moe, token by token, on the same sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lora_moe
from lora_moe import LoraMoeConfig

from . import engine, models

pytest.importorskip(
    "vllm", reason="vLLM is not installed: make test-vllm makes an environment with it"
)

NEW = 12
# of logits, or of gates if a bias or bound decides: below it, two computations may pick other experts
GAP = 1e-5


def compare(model, rounds, most=1e-4):
    """Asserts a difference of at most `most` wherever both picked the same experts.

    They may differ only after a decision within GAP of an alternative, at most 1 in 10,000 of which may be
    flipped; a flip affects all later tokens of its sequence.
    """
    worst = tokens = decisions = flips = 0
    for answer in (a for answers in rounds for a in answers):
        expected, gaps = models.log_probabilities(model, answer["sequence"])
        n = len(answer["logprobs"])
        difference = (torch.tensor(answer["logprobs"]) - expected[-n:]).abs()
        sure = (gaps[:-1] > GAP).all(1).cumprod(0).bool()[-n:]
        over = difference > most
        assert not (over & sure).any(), difference[over & sure]
        tokens, decisions, flips = tokens + n, decisions + gaps.numel(), flips + int(over.any())
        worst = max([worst, *difference[~over].tolist()])
    print(
        f"{tokens} tokens, {decisions} decisions, {flips} flips; elsewhere at most {worst:.1e} apart"
    )
    assert flips <= decisions / 10_000


def ask(tmp_path, base, adapter, **fields):
    job = {
        "engine": engine.fields(base, adapter, **fields),
        "prompts": models.prompts(),
        "new": NEW,
    }
    return engine.run(tmp_path, job)


RUNS = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "TP=2": {"tensor_parallel_size": 2},
    "TP=2, compiled": {"tensor_parallel_size": 2, "enforce_eager": False},
    "TP=4": {"tensor_parallel_size": 4},
    # vLLM 0.32's CPU worker cannot run an eager model in a pipeline, with or without experts
    "PP=2, compiled": {"pipeline_parallel_size": 2, "enforce_eager": False},
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_every_kind_of_experts(fields, base, every_kind, tmp_path):
    """16 prompts of various lengths, prefilled in chunks; the second round uses cached prefixes."""
    out = ask(tmp_path, base, every_kind, **fields)
    first, again = out["rounds"]
    model = lora_moe.load_adapter(models.load_base(base), every_kind)
    compare(model, out["rounds"])
    assert sum(a["cached"] > 0 for a in again) >= 8
    assert len(first[0]["logprobs"]) == 80 + NEW - 1 and len(again[0]["logprobs"]) == NEW
    # the experts affect the output: the base alone gives other values
    plain, _ = models.log_probabilities(models.load_base(base), first[0]["sequence"])
    assert (torch.tensor(first[0]["logprobs"]) - plain).abs().mean() > 0.05


def test_a_second_adapter_does_not_get_the_graphs_of_the_first(base, every_kind, tmp_path):
    """One folder for vLLM's compile cache; the graphs differ, as the second has fewer experts."""
    few = [LoraMoeConfig(num_experts=2, r=2, top_k=1, target_modules=("up_proj", "o_proj"))]
    few = models.save_adapter(base, tmp_path / "few", few)
    for adapter in (every_kind, few):
        job = {"prompts": models.prompts(4), "new": 4}
        job["engine"] = engine.fields(base, adapter, enforce_eager=False)
        rounds = engine.run(tmp_path, job, VLLM_CACHE_ROOT=tmp_path / "cache")["rounds"]
        compare(lora_moe.load_adapter(models.load_base(base), adapter), rounds)


def of_model(base, adapter, dtype, answers):
    """transformers' log-probabilities of the same tokens."""
    model = models.load_base(base, dtype)
    if adapter:
        lora_moe.load_adapter(model, adapter)
    return torch.cat([models.log_probabilities(model, a["sequence"])[0] for a in answers])


def apart(a, b):
    """Mean and 95th percentile of the absolute difference."""
    difference = (a - b).abs().numpy()
    return np.array([difference.mean(), np.percentile(difference, 95)])


def test_bf16_is_as_near_as_the_base_is(base, every_kind, tmp_path):
    """Close to transformers in bf16 for experts of typical size, and to exact values for large experts.

    Large experts outweigh the base, and rounding may send a token to other experts: there the bound is the
    error of transformers itself in bf16.
    """
    usual = models.save_adapter(base, tmp_path / "usual", models.KINDS, scale=0.005)
    found = {}
    for name, adapter in (("base", None), ("usual", usual), ("large", every_kind)):
        answers = ask(tmp_path, base, adapter, dtype="bfloat16")["rounds"][0]
        served = torch.cat([torch.tensor(a["logprobs"]) for a in answers])
        rounded = of_model(base, adapter, torch.bfloat16, answers)
        exact = of_model(base, adapter, torch.float32, answers)
        plain = of_model(base, None, torch.float32, answers)
        found[name] = apart(served, rounded), apart(served, exact), apart(rounded, exact)
        print(name, *found[name], "effect of the experts", apart(exact, plain))
    assert (found["usual"][0] <= 2 * found["base"][0]).all()
    assert (found["large"][1] <= 2 * found["large"][2]).all()


def test_the_folder_that_peft_saves(base, tmp_path):
    peft = pytest.importorskip("peft")
    from lora_moe.peft import MoeLoraConfig

    torch.manual_seed(0)
    config = MoeLoraConfig(num_experts=4, r=4, target_modules=["q_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(models.load_base(base), config)
    with torch.no_grad():
        for layer in lora_moe.injected(model).values():
            layer.lora_B.normal_(std=0.1)
    model.save_pretrained(tmp_path / "peft")
    out = ask(tmp_path, base, tmp_path / "peft")
    compare(lora_moe.load_adapter(models.load_base(base), tmp_path / "peft"), out["rounds"])


def test_vllms_model_of_transformers_itself(base, every_kind, tmp_path):
    """vLLM's backend for models without vLLM code, which uses the linears of transformers."""
    out = ask(tmp_path, base, every_kind, model_impl="transformers")
    compare(lora_moe.load_adapter(models.load_base(base), every_kind), out["rounds"])
