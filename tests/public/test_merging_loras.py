"""merge: a fixed mixture merged into one LoRA; Graft's coefficients."""

from __future__ import annotations

import math

import pytest
import torch

import lora_moe
from lora_moe import LoraMoeConfig, graft_weights, inject, injected, merge

from ..support.merging import BANKS, C, Model, X, close, mixture, with_experts


@pytest.mark.parametrize("bank", BANKS)
def test_into_one_lora(bank):
    model = with_experts(bank)
    expected = mixture(model)
    merge(model, C, into="lora")
    ranks = {"equal": 4, "unequal": 3, "shared": 3}  # the expert with coefficient zero is left out
    assert {layer.config.ranks for layer in injected(model).values()} == {(ranks[bank],)}
    close(model(X), expected)
    close(mixture(model, [1.0]), expected)


def test_a_lower_rank_is_the_nearest():
    model = with_experts("unequal")
    layer = model.up
    exact = sum(
        c * s * layer.lora_B[i:j].T @ layer.lora_A[i:j]
        for c, s, i, j in zip((1, 1, 1), layer.scales, layer.offsets, layer.offsets[1:])
    )
    merge(model, [1.0] * 3, into="lora", r=2)
    got = model.up.lora_B.T @ model.up.lora_A
    u, s, vh = torch.linalg.svd(exact)
    close(got, (u[:, :2] * s[:2]) @ vh[:2])
    for wrong in (0, True, 2000):
        with pytest.raises(ValueError, match=r"r: expected an integer in \[1, 1024\]"):
            merge(with_experts(), C, into="lora", r=wrong)


def test_nothing_left_is_a_lora_of_zeros():
    model = with_experts()
    base = mixture(model, [0.0] * 3)
    merge(model, [0.0] * 3, into="lora")
    assert torch.equal(model(X), base)


def test_the_one_lora_trains_as_the_bank_did():
    model = with_experts(model=Model(torch.float32), dropout=0.25)
    model.up.lora_A.requires_grad_(False)
    merge(model.train(), C, into="lora")
    assert model.up.config.dropout == 0.25 and model.up.training
    assert not model.up.lora_A.requires_grad and model.up.lora_B.requires_grad
    assert not model.up.base_layer.weight.requires_grad


def updates(layer):
    offsets = layer.offsets
    A = layer.lora_A if not layer.config.shared_a else layer.lora_A.repeat(3, 1)
    return [s * layer.lora_B[i:j].T @ A[i:j] for s, i, j in zip(layer.scales, offsets, offsets[1:])]


@pytest.mark.parametrize("bank", BANKS)
def test_graft_weights_equal_the_formula(bank):
    model = with_experts(bank)
    got = graft_weights(model, local=0.25, compatibility=2.0, total=1.5)
    M = {path: updates(layer) for path, layer in injected(model).items()}
    for path, own in M.items():
        q = []
        for e in range(3):
            a = own[e].norm() / sum(m.norm() for m in own)
            energy = [M[p][e].norm() ** 2 for p in M]
            p = [value / sum(energy) for value in energy]
            h = -sum(v * v.log() for v in p) / math.log(2)
            cosines = [
                (own[e] * own[f]).sum() / own[e].norm() / own[f].norm() for f in range(3) if f != e
            ]
            k = sum((1 + c) / 2 for c in cosines) / 2
            q.append(a**0.25 * h**0.75 * k**2)
        close(got[path], 1.5 * torch.stack(q) / sum(q))


def test_graft_of_experts_without_an_update():
    model = with_experts()
    with torch.no_grad():
        for layer in injected(model).values():
            layer.lora_B[2:4] = 0
    assert all(c[1] == 0 and abs(c.sum() - 1) < 1e-12 for c in graft_weights(model).values())
    expected = mixture(model, [0.5, 0.5, 0.5])
    merged = merge(model, graft_weights(model, local=0.0, compatibility=0.0), into="lora")
    assert torch.isfinite(merged(X)).all() and not torch.equal(merged(X), expected)
    fresh = inject(Model(), LoraMoeConfig(num_experts=3, r=2, target_modules=("up",)))
    assert not graft_weights(fresh)["up"].any()


def test_graft_refuses():
    with pytest.raises(ValueError, match=r"local: expected a number in \[0, 1\], got 2"):
        graft_weights(with_experts(), local=2)
    with pytest.raises(ValueError, match="compatibility: expected a number of at least 0"):
        graft_weights(with_experts(), compatibility=-1)
    model = inject(Model(), LoraMoeConfig(num_experts=3, target_modules=("up",)))
    inject(model, LoraMoeConfig(num_experts=2, target_modules=("down",)))
    with pytest.raises(ValueError, match=r"equally many experts per layer, got \[2, 3\]"):
        graft_weights(model)


def test_peft_computes_the_one_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_experts(model=Model(torch.float32), target_modules=("up",))
    x = X.float()
    expected = mixture(model, x=x)
    (folder,) = lora_moe.to_peft(merge(model, C, into="lora"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(torch.float32), folder)
    with torch.no_grad():
        close(theirs(x), expected, 1e-5)
