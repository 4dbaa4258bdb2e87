"""Forward and all gradients of every preset equal its formula, in fp64.

LORA_MOE_BACKEND=triton runs the same tests in fp32 on the interpreted Triton kernels.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    aux_loss,
    backend_info,
    inject,
    presets,
    router_stats,
    use_routing,
)
from lora_moe.middles import ModalSlotMiddle, UnpairedMiddle
from lora_moe.routers import FactorRouter, GenericRouter, HiddenRouter, NoisyRouter, ThresholdRouter

from .formulas import CASES
from .mixtures import D_IN, D_OUT, MASK, TASKS, B, L

TRITON = backend_info()["serving"]["cpu"] == "triton"  # Triton has no fp64
DTYPE = torch.float32 if TRITON else torch.float64
NEAR = {"rtol": 1e-4, "atol": 2e-5} if TRITON else {"rtol": 1e-12, "atol": 1e-12}


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT, dtype=DTYPE)

    def forward(self, x):
        return self.linear(x)


def prepared(name, seed=0):
    """A linear with experts, all tensors random, and its input."""
    torch.manual_seed(seed)
    model = inject(One(), CASES[name].make(target_modules=("linear",)))
    layer = model.linear
    with torch.no_grad():
        for tensor in layer.adapter_state().values():
            nn.init.normal_(tensor, std=0.7)
    return model, layer, torch.randn(B, L, D_IN, dtype=DTYPE, requires_grad=True)


def told(model, case, mask=MASK):
    return use_routing(model, task_ids=TASKS if case.tasks else None, mask=mask)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_equals_its_formula(name, train):
    model, layer, x = prepared(name)
    case = CASES[name]
    model.train(train)
    given = {"tasks": TASKS, "mask": MASK, "train": train}
    p = {k: t.detach().clone().requires_grad_() for k, t in layer.adapter_state().items()}
    wide = x.detach().clone().requires_grad_()
    want = layer.base_layer(wide) + case.formula(p, wide, **given)
    with told(model, case):
        torch.manual_seed(1)
        got = model(x)
    torch.testing.assert_close(got, want, **NEAR)
    assert (want - layer.base_layer(x)).abs().max() > 0.1
    dy = torch.randn_like(want)
    got.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(x.grad, wide.grad, **NEAR)
    for key, tensor in layer.adapter_state().items():
        if not tensor.requires_grad:
            continue  # a buffer
        truth = torch.zeros_like(tensor) if p[key].grad is None else p[key].grad
        torch.testing.assert_close(tensor.grad, truth, **NEAR, msg=lambda m, k=key: f"{k}: {m}")
        still = key == "noise_weight" and not train
        still |= (name, key) == ("moa", "router_weight")  # weight 1: only the label loss trains it
        still |= key == "router_weight_1"  # of a task without samples in the batch
        assert (truth.abs().max() > 1e-6) != still, key


@pytest.mark.parametrize("name", CASES)
def test_frozen_experts_take_no_gradient(name):
    model, layer, x = prepared(name)
    layer.frozen = (1, 2)
    with told(model, CASES[name]):
        model(x).square().sum().backward()
    o = layer.offsets
    for e in (1, 2):
        assert not layer.lora_B.grad[o[e] : o[e + 1]].any()
        assert layer.config.shared_a or not layer.lora_A.grad[o[e] : o[e + 1]].any()
    assert layer.lora_B.grad.any()


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].tasks])
def test_a_sample_without_a_task_and_a_forward_without_task_ids(name):
    model, layer, x = prepared(name)
    model.eval()
    with pytest.raises(RuntimeError, match="task_ids"):
        model(x)
    with told(model, CASES[name], mask=torch.ones(B, L)):
        want = model(x)
    with use_routing(model, task_ids=torch.tensor([2, -1])):
        got = model(x)
    torch.testing.assert_close(got[0], want[0])
    assert not torch.equal(got[1], want[1])
    shares_experts = name in ("mlore", "c_lorae", "smola_modal")  # these have experts for all tasks
    assert torch.equal(got[1], layer.base_layer(x)[1]) != shares_experts


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_it_equals_the_formula_of_the_rounded_values(name):
    torch.manual_seed(0)
    model = One().to(torch.bfloat16)
    layer = inject(model, CASES[name].make(target_modules=("linear",))).linear.eval()
    for tensor in layer.adapter_state().values():
        nn.init.normal_(tensor.data, std=0.7)
    x = torch.randn(B, L, D_IN).to(torch.bfloat16).requires_grad_()
    with told(model, CASES[name]):
        got = model(x)
    got.sum().backward()
    p = {k: t.detach().double() for k, t in layer.adapter_state().items()}
    added = CASES[name].formula(p, x.detach().double(), tasks=TASKS, mask=MASK, train=False)
    error = got.double() - layer.base_layer(x).double() - added
    assert got.dtype == torch.bfloat16 and error.norm() < 0.02 * added.norm()
    for parameter in layer.adapter_state().values():
        assert not parameter.requires_grad or parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_no_sample(name):
    model, layer, _ = prepared(name)
    x = torch.zeros(0, L, D_IN, dtype=DTYPE, requires_grad=True)
    none = TASKS[:0] if CASES[name].tasks else None
    with use_routing(model, task_ids=none, mask=MASK[:0]):
        y = model(x)
    y.sum().backward()
    assert y.shape == (0, L, D_OUT)
    assert not any(p.grad.any() for p in layer.adapter_state().values() if p.requires_grad)


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_survives_its_dict(name):
    config = CASES[name].make(target_modules=("linear",))
    for each in config if isinstance(config, tuple) else (config,):
        assert type(each).from_dict(each.to_dict()) == each


def test_contrastive_loss_of_more():
    model, layer, x = prepared("more")
    with told(model, CASES["more"]), presets.contrastive_loss(model, TASKS, MASK) as contrast:
        with contextlib.suppress(RuntimeError):
            contrast()
            pytest.fail("no forward has run")
        model(x)
    z, want = layer.task_embedding, 0
    for b, first in ((0, 1), (1, 0)):
        cosine = torch.stack([x[b, first] @ t / x[b, first].norm() / t.norm() for t in z])
        want = want - torch.log_softmax(cosine / 0.05, 0)[TASKS[b]] / B
    torch.testing.assert_close(contrast(), want, **NEAR)
    grads = torch.autograd.grad(contrast(), z)[0], torch.autograd.grad(want, z)[0]
    torch.testing.assert_close(*grads, **NEAR)


def test_mola_with_a_list_for_each_layer():
    made = presets.mola((2, 4), (8, 3), target_modules=("q_proj", "v_proj"))
    assert [(c.num_experts, c.r, c.top_k) for c in made] == [(2, 8, 2), (4, 3, 2)]
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(6, 6)}) for _ in range(2))
    model.layers.append(nn.ModuleDict({"k_proj": nn.Linear(6, 6)}))
    inject(model, made)
    assert [y["q_proj"].config.num_experts for y in model.layers[:2]] == [2, 4]
    with pytest.raises(ValueError, match="equal length"):
        presets.mola((2, 4), (8,), target_modules=("q_proj",))
    with pytest.raises(ValueError, match="names with a list"):
        presets.mola((2, 4), target_modules="all-linear")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoisyRouter(std=float("nan")), "std"),
        (lambda: NoisyRouter(expert_dropout=1), "expert_dropout"),
        (lambda: NoisyRouter(std=0.1, learned=True), "learned"),
        (lambda: HiddenRouter(0), "hidden_size"),
        (lambda: FactorRouter(scored=1), "scored"),
        (lambda: FactorRouter(weight=-1), "weight"),
        (lambda: GenericRouter(2, noise=None), "noise"),
        (lambda: ThresholdRouter("1"), "max_threshold"),
        (lambda: ModalSlotMiddle(1, 2, (2,)), "modalities"),
        (lambda: presets.moelora(3, 8), "r: expected a multiple of 3"),
        (lambda: presets.more(2, 3, 8), "r: expected a multiple of 3"),
        (lambda: presets.c_lorae(30, 24), "num_tasks"),
        (lambda: presets.mtl_lora(0), "num_tasks"),
        (lambda: presets.adamole(max_threshold=0), "max_threshold"),
        (lambda: presets.smola(segments=0), "segments"),
        (lambda: presets.hydralora(gate="tanh"), "gate"),
        (lambda: presets.adamole(gate="sigmoid"), "gate"),
        (lambda: inject(One(), presets.mlore(3, (1, 1), target_modules=("linear",))), "top_k"),
        (
            lambda: inject(
                One(), presets.mlore(1, (1,), 1, target_modules=("linear",), balance_coef=0.1)
            ),
            "cv_squared",
        ),
        (
            lambda: inject(
                One(), LoraMoeConfig(middle=UnpairedMiddle(), target_modules=("linear",))
            ),
            "rank 1",
        ),
        (
            lambda: inject(One(), presets.mtl_lora(2, shared_a=False, target_modules=("linear",))),
            "shared_a",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_moelora_equals_the_baseline_of_branch_lora():
    from lora_moe.methods import branch_lora

    given = {"num_experts": 4, "r": 8, "alpha": 6.0, "target_modules": ("linear",)}
    assert presets.moelora(**given) == branch_lora.moelora(**given)
    assert presets.moelora() == branch_lora.moelora()


def test_the_table_of_methods_has_every_preset():
    rows = (Path(__file__).parents[3] / "docs/methods.md").read_text().splitlines()
    rows = {row.split("`")[1]: row for row in rows if row.startswith("| `")}
    papers = [n for n in presets.__all__ if n not in ("Adapters", "contrastive_loss", "two_passes")]
    assert sorted(n for n in rows if "](https://arxiv.org/abs/" in rows[n]) == sorted(papers)
    for name in papers:
        number = re.search(r"arxiv.org/abs/([0-9.]+)", rows[name])[1]
        assert f"arXiv {number}" in getattr(presets, name).__doc__, name


@pytest.mark.parametrize("name", CASES)
def test_balance_and_statistics_work_for_every_preset(name):
    coefficients = {"z_coef": 0.1, "balance_coef": 0.0 if name == "mlore" else 0.1}
    torch.manual_seed(0)
    config = CASES[name].make(target_modules=("linear",), **coefficients)
    model = inject(One(), config).train()
    with told(model, CASES[name]):
        model(torch.randn(B, L, D_IN, dtype=DTYPE))
    loss = aux_loss(model)
    if name == "c_lorae":  # both experts are given, so there is nothing to balance
        assert loss == 0
    else:
        loss.backward()
        assert loss.isfinite() and loss > 0
    assert all(
        p.grad.isfinite().all() for p in model.linear.router_parameters() if p.grad is not None
    )
    assert router_stats(model)["linear"]["load"].sum() == pytest.approx(1)


@pytest.mark.parametrize("gate", ["softmax", "sum"])
def test_c_lorae_equals_the_mixture_of_the_method(gate):
    from lora_moe.methods.c_lorae import CLoraeConfig

    given = {"num_tasks": 3, "r": 7, "alpha": 5.0, "task_alpha": 2.0, "gate": gate, "dropout": 0.1}
    assert presets.c_lorae(**given) == CLoraeConfig(**given).mixture
