"""BranchLoRA's layer against its formula, and its lifecycle over a sequence of tasks."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_moe
from lora_moe import LoraMoeConfig, safefile
from lora_moe.methods import branch_lora as bl
from lora_moe.methods.branch_lora.adapters import READS
from lora_moe.methods.branch_lora.continual import TaskSelector, continual_metrics

from ..stack.test_transformers import MODELS, build
from ..support.compare import relative_error
from ..support.interpreter import interpreting
from ..support.through import through

transformers = pytest.importorskip("transformers")
BACKEND = lora_moe.backend_info()["serving"]["cpu"]
D_IN, D_OUT, E, R, K = 24, 20, 5, 3, 2
B, L = 4, 6
# a left-padded row, a right-padded one, a full one, one with a gap
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1] * 6, [0, 1, 0, 1, 1, 0]])
ids = {"argnames": "reads", "argvalues": READS}
every_reading = pytest.mark.parametrize(**ids)


class Host(nn.Module):
    """A model of one linear that takes what Hugging Face's take."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT, dtype=dtype)

    def forward(self, x, attention_mask=None, labels=None, past_key_values=None):
        return self.linear(x)


def host(reads="first", *, tasks=1, seed=0, dtype=torch.float64, **fields):
    """A Host whose task has begun, with branches of order one and routers that disagree."""
    torch.manual_seed(seed)
    model = Host(dtype)
    sizes = {"num_branches": E, "r": R, "top_k": K, "alpha": 7.5, "target_modules": ("linear",)}
    bl.inject(model, bl.branch_lora(**sizes | fields), reads=reads)
    for task in range(tasks):
        bl.begin_task(model)
        randomise(model)
        if task + 1 < tasks:
            bl.end_task(model, 0)
    return model


def randomise(model):
    for layer in bl.branch_layers(model).values():
        for branch in bl.branches_of(layer):
            nn.init.normal_(branch)
        nn.init.normal_(bl.routers_of(layer)[-1], std=0.5)


def tokens(dtype=torch.float64, seed=1):
    return torch.randn(B, L, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def formula(layer, x, mask, reads, tasks):
    """y_i = W0 x_i + b + s * sum over j in topk(W_t x_*) of  g_j B_j A x_i, token by token, and usage."""
    base, rows = layer.base_layer, []
    usage = torch.zeros(len(bl.branches_of(layer)), dtype=x.dtype)
    for b in range(x.shape[0]):
        real = [i for i in range(x.shape[1]) if mask[b, i]]
        for i in range(x.shape[1]):
            by = {"first": x[b, real[0]], "mean": sum(x[b, j] for j in real) / len(real)}
            router = bl.routers_of(layer)[tasks[b]]
            p = torch.softmax(router @ by.get(reads, x[b, i]), 0)
            picked = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))[:K]
            y = base.weight @ x[b, i] + base.bias
            for e in picked:
                gate = p[e] / sum(p[j] for j in picked)
                y = y + layer.scales[0] * gate * bl.branches_of(layer)[e].T @ (
                    layer.lora_A @ x[b, i]
                )
                if mask[b, i] if reads == "token" else i == 0:
                    usage[e] += gate.item()
            rows.append(y)
    return torch.stack(rows).view(x.shape[0], x.shape[1], -1), usage


def leaves(model, x):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"x": x} | trained


def gradients(y, dy, model, x):
    named = leaves(model, x)
    found = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    return dict(zip(named, found))


@every_reading
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "full"])
def test_the_layer_is_its_formula(reads, masked):
    model, x = host(reads), tokens().requires_grad_()
    mask = MASK if masked else torch.ones_like(MASK)
    y = model(x, attention_mask=mask if masked else None)
    want, usage = formula(model.linear, x, mask, reads, [0] * B)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    got, expected = gradients(y, dy, model, x), gradients(want, dy, model, x)
    assert relative_error(y, want) < 1e-12
    assert {"x", "linear.lora_A", "linear.router_weight_0", "linear.lora_B"} <= set(got)
    for name, grad in got.items():
        truth = expected[name]
        if truth is None:
            assert not grad.any(), name
        else:
            assert relative_error(grad, truth) < 1e-12, name
    assert torch.allclose(model.linear.usage.double(), usage, rtol=1e-6)
    assert model.linear.scales[0] == 0.5


@every_reading
def test_on_tritons_kernels(reads):
    pytest.importorskip("triton")
    with interpreting() if not torch.cuda.is_available() else contextlib.nullcontext():
        kernels = importlib.import_module("lora_moe.triton_kernels")
    model, x = host(reads, dtype=torch.float32), tokens(torch.float32).requires_grad_()
    truth, x_truth = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    want, _ = formula(truth.linear, x_truth, MASK, reads, [0] * B)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    with through(kernels):
        y = model(x, attention_mask=MASK)
        got = gradients(y, dy, model, x)
    assert relative_error(y, want) < 12 * 2**-24
    for name, truth_grad in gradients(want, dy.double(), truth, x_truth).items():
        if truth_grad is None:
            assert not got[name].any()
        else:
            assert relative_error(got[name], truth_grad) < 40 * 2**-24, name


@every_reading
def test_each_sequence_may_have_its_own_task(reads):
    model, x, tasks = host(reads, tasks=3).eval(), tokens(), [2, 0, 1, 2]
    bl.set_task(model, tasks)
    mixed = model(x, attention_mask=MASK)
    assert relative_error(mixed, formula(model.linear, x, MASK, reads, tasks)[0]) < 1e-12
    for b, task in enumerate(tasks):
        bl.set_task(model, task)
        assert torch.equal(model(x, attention_mask=MASK)[b], mixed[b])


def test_starts_as_the_base_bit_for_bit_and_without_a_task_it_says_so():
    model = Host(torch.float32)
    want = model.linear(tokens(torch.float32))
    bl.inject(model, bl.branch_lora(E, R, target_modules=("linear",)))
    with pytest.raises(RuntimeError, match="task_ids: expected"):
        model(tokens(torch.float32))
    bl.begin_task(model)
    assert torch.equal(model(tokens(torch.float32)), want)


@every_reading
def test_gradient_checkpointing_counts_once_and_changes_nothing(reads):
    plain, again = host(reads, dropout=0.3), host(reads, dropout=0.3)
    dy = torch.ones(B, L, D_OUT, dtype=torch.float64)
    for use_reentrant in (True, False):
        for layer in (plain.linear, again.linear):
            layer.usage.zero_()
        for model, call in ((plain, lambda f, *a, **_: f(*a)), (again, checkpoint)):
            torch.manual_seed(3)
            model.zero_grad()
            x = tokens().requires_grad_()
            call(model, x, MASK, use_reentrant=use_reentrant).backward(dy)
        for (name, p), (_, q) in zip(plain.named_parameters(), again.named_parameters()):
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), name
        assert plain.linear.usage.any() and torch.equal(plain.linear.usage, again.linear.usage)


@every_reading
def test_compiles(reads):
    model, x = host(reads).eval(), tokens()
    bl.set_mask(model, MASK)
    layer = model.linear
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < 1e-15


def test_copies_are_apart():
    model = host(tasks=2)
    model(tokens(), attention_mask=MASK)
    copied = copy.deepcopy(model)
    assert bl.parts(copied)[1] is not bl.parts(model)[1]
    bl.set_task(copied, 0)
    other = copied(tokens(), attention_mask=MASK)
    assert bl.parts(model)[1].task == 1 and not torch.equal(other, model(tokens(), MASK))


def step(model, optimizer, seed):
    x = tokens(next(model.parameters()).dtype, seed)
    model(x, attention_mask=MASK).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def learn(model, steps=3, seed=0):
    """A task with the optimizer that would move frozen rows most: momentum and weight decay."""
    trained = list(model.parameters())
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1)
    for i in range(steps):
        step(model, optimizer, 10 * seed + i)
    return optimizer


def test_frozen_branches_do_not_change_by_a_bit():
    model = host()
    optimizer = learn(model)
    used = model.linear.usage.clone()
    bl.end_task(model)
    layer = model.linear
    assert layer.frozen == tuple(sorted(used.topk(K).indices.tolist())) and not layer.usage.any()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    branches = [rows.detach().clone() for rows in bl.branches_of(layer)]
    bl.begin_task(model)
    for i in range(3):  # also with the old optimizer, whose momentum remembers them
        step(model, optimizer, i)
    learn(model, seed=1)
    for e in range(E):
        same = torch.equal(bl.branches_of(layer)[e], branches[e])
        assert same == (e in layer.frozen), e
    assert torch.equal(bl.routers_of(layer)[0], before["router_weight_0"])
    assert not torch.equal(layer.lora_A, before["lora_A"])


def test_only_training_of_the_open_task_is_counted():
    model, usage = host(tasks=2), lambda: model.linear.usage.tolist()
    bl.set_task(model, 0)
    model(tokens(), attention_mask=MASK)
    bl.set_task(model, [1, 1, 1, 1])
    model(tokens(), attention_mask=MASK)
    bl.set_task(model, 1)
    model.eval()(tokens(), attention_mask=MASK)
    assert usage() == [0] * E
    model.train()(tokens(), attention_mask=MASK)
    assert sum(usage()) == pytest.approx(B)
    bl.end_task(model, 0)
    model(tokens(), attention_mask=MASK)
    assert usage() == [0] * E


class Backward(TorchDispatchMode):
    """Counts the multiply-adds of dB that a backward is asked for: slots of branches not frozen."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname.endswith("lora_backward"):
            given = dict(zip([a.name for a in func._schema.arguments], args)) | (kwargs or {})
            busy = ~torch.isin(given["indices"], torch.tensor(given["frozen"], dtype=torch.int32))
            self.products.append(int(busy.sum()) * R * given["dy"].shape[1] * given["need_b"])
        return func(*args, **(kwargs or {}))


@every_reading
def test_frozen_branches_cost_no_work_in_dB(reads):
    model, x = host(reads), tokens()
    dy = torch.ones(B, L, D_OUT, dtype=torch.float64)

    def backward():
        with Backward() as counted:
            model(x, attention_mask=MASK).backward(dy)
        return counted.products

    layer = model.linear
    (full,) = backward()
    assert full == B * L * K * R * D_OUT
    busiest = int(layer.usage.argmax())
    slots = int((layer.routing.indices == busiest).sum())
    assert slots
    layer.frozen = [busiest]
    assert backward() == [full - slots * R * D_OUT]
    layer.frozen = range(E)
    assert backward() == [0]


@pytest.mark.skipif(BACKEND != "cpp", reason="of the C++ backend")
def test_the_kernel_does_not_touch_what_a_frozen_branch_would_read():
    """0 x NaN is NaN: had dB been computed and thrown away, it would show."""
    x = tokens()[0]
    routing = lora_moe.Routing.from_ids(torch.tensor([1, 0, 1, 0, 0, 1]), num_experts=2)
    a, b = torch.randn(R, D_IN).double(), torch.randn(2 * R, D_OUT).double().requires_grad_()
    y = lora_moe.functional.grouped_lora(
        x, a, b, routing, rank_offsets=R, shared_a=True, frozen=[1]
    )
    dy = torch.ones_like(y)
    dy[[0, 2, 5]] = torch.nan  # tokens of branch 1
    (db,) = torch.autograd.grad(y, b, dy)
    assert not db[R:].any() and db[:R].isfinite().all() and db[:R].any()


@every_reading
def test_new_branches_keep_old_outputs_bit_for_bit_and_serve_new_tasks(reads):
    model, x = host(reads, tasks=2), tokens()
    bl.end_task(model)
    model.eval()

    def answers():
        out = []
        for task in (0, 1, [0, 1, 1, 0]):
            bl.set_task(model, task)
            out.append(model(x, attention_mask=MASK))
        return out

    before = answers()
    bl.add_branches(model, 3)
    assert all(map(torch.equal, answers(), before))
    model.train()
    bl.begin_task(model)
    learn(model)
    layer = model.linear
    assert (
        bl.routers_of(layer)[2].shape[0] == E + 3 == len(bl.branches_of(layer)) == len(layer.usage)
    )
    with torch.no_grad():  # a router that wants the new ones only
        bl.routers_of(layer)[2].zero_()[E:] = 10 * x[:, 0].sum(0)
    chosen = model(x, attention_mask=MASK) is not None and layer.routing.indices
    assert (chosen >= E).any()


def test_all_frozen_warns():
    model = host()
    bl.end_task(model, 0)
    model.linear.frozen = range(E)
    with pytest.warns(UserWarning, match="add_branches"):
        bl.begin_task(model)


# --- which tokens decide ----------------------------------------------------------------------------


def llama(**fields):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=24, eos_token_id=None, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def branched(model, targets=("q_proj", "down_proj"), tasks=1, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bl.inject(model, bl.branch_lora(E, R, K, 60.0, target_modules=targets), **options)
    for task in range(tasks):
        bl.begin_task(model)
        for layer in bl.branch_layers(model).values():
            for branch in bl.branches_of(layer):
                nn.init.normal_(branch, std=0.3)
            nn.init.normal_(bl.routers_of(layer)[-1], std=1.0)
        if task + 1 < tasks:
            bl.end_task(model, 0)
    return model


PROMPTS = torch.randint(3, 38, (3, 5), generator=torch.Generator().manual_seed(0))


def test_first_token_of_a_causal_model_warns_and_reads_the_mean():
    with pytest.warns(UserWarning, match="sequences decide by their mean"):
        model = llama()
        bl.inject(model, bl.branch_lora(E, R, target_modules=("q_proj",)))
    assert bl.parts(model)[1].reads == "mean"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = bl.inject(llama(), bl.branch_lora(target_modules=("q_proj",)), fixed_opening=False)
        assert bl.parts(kept)[1].reads == "first"
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
            intermediate_size=24,
        )  # fmt: skip
        bert = bl.inject(transformers.BertModel(config), bl.branch_lora(target_modules=("query",)))
    assert bl.parts(bert)[1].reads == "first"


@pytest.mark.parametrize("reads", ["first", "mean"])
def test_generation_keeps_the_prompts_decision(reads):
    model = branched(llama(), reads=reads, fixed_opening=False)
    prompt = torch.cat([torch.zeros(3, 2, dtype=torch.long), PROMPTS], 1)
    mask = (prompt > 0).long()
    decided = []
    layer = next(iter(bl.branch_layers(model).values()))
    layer.register_forward_hook(lambda m, args, y: decided.append((args[0].shape[1], m.routing)))
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert [n for n, _ in decided] == [7] + [1] * 5
    first = decided[0][1].indices[::7], decided[0][1].weights[::7]
    assert all(
        torch.equal(r.indices, first[0]) and torch.equal(r.weights, first[1])
        for _, r in decided[1:]
    )
    # the same tokens without a cache, the prompt alone deciding
    with torch.no_grad():
        seen = torch.zeros_like(out[:, :-1]).bool()
        seen[:, :7] = mask.bool()
        bl.set_mask(model, seen)
        full = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
        positions = (full.cumsum(1) - 1).clamp(min=0)
        logits = model(out[:, :-1], attention_mask=full, position_ids=positions).logits
        bl.set_mask(model, None)
    assert torch.equal(logits[:, 6:].argmax(-1), out[:, 7:])


def test_beams_keep_their_prompts_decision():
    model = branched(llama(), reads="mean")
    out = model.generate(PROMPTS, max_new_tokens=5, num_beams=3, do_sample=False)
    layer = next(iter(bl.branch_layers(model).values()))
    assert layer.routing.indices.shape == (9, K)
    for prompt, row in zip(PROMPTS, out):
        alone = model.generate(prompt[None], max_new_tokens=5, num_beams=3, do_sample=False)
        assert torch.equal(alone[0], row)


def test_a_cache_of_other_prompts_is_refused():
    model = branched(llama(), reads="mean")
    cache = model(PROMPTS, use_cache=True).past_key_values
    model(PROMPTS[:2])
    with pytest.raises(ValueError, match="past_key_values: expected those of the last prompts, 2"):
        model(PROMPTS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("reads", ["first", "mean"])
def test_answers_do_not_decide(reads):
    """In training the answer stands behind the prompt; at test time it does not."""
    model = branched(llama(), reads=reads, fixed_opening=False)
    layer = next(iter(bl.branch_layers(model).values()))

    def decision(ids, **more):
        model(ids, **more)
        return layer.routing.weights[:: ids.shape[1]]

    alone = decision(PROMPTS)
    both = torch.cat([PROMPTS, PROMPTS.flip(0)], 1)
    labels = torch.cat([torch.full_like(PROMPTS, -100), PROMPTS.flip(0)], 1)
    assert torch.allclose(decision(both, labels=labels), alone, atol=1e-6)
    if reads == "mean":
        assert not torch.allclose(decision(both), alone, atol=1e-3)
    # nothing but answers: the first token, which every one of them sees
    first = decision(both[:, :1])
    assert torch.allclose(decision(both, labels=both), first, atol=1e-6)


def test_padding_changes_no_decision():
    model = branched(llama(), reads="mean")
    layer = next(iter(bl.branch_layers(model).values()))
    model(PROMPTS)
    want = layer.routing.weights[::5]
    for pads in (
        torch.cat([torch.zeros(3, 4).long(), PROMPTS], 1),
        nn.functional.pad(PROMPTS, (0, 4)),
    ):
        mask = (pads > 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(pads, attention_mask=mask, position_ids=positions)
        assert torch.allclose(layer.routing.weights[::9], want, atol=1e-5)


def test_masks_that_do_not_fit_are_refused():
    model, x = host(), tokens()
    with pytest.raises(ValueError, match=r"attention_mask: expected \(4, 6\) as x, got \(4, 5\)"):
        model(x, attention_mask=MASK[:, :5])
    with pytest.raises(ValueError, match=r"attention_mask: expected \(B, L\), got \(4, 1, 6, 6\)"):
        model(x, attention_mask=MASK[:, None, None].expand(B, 1, L, L))
    with pytest.raises(ValueError, match=r"x: expected \(B, L, D_in\)"):
        model(x[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: bl.begin_task(m), "expected end_task for task 0 first"),
        (lambda m: (bl.end_task(m), bl.end_task(m)), "expected begin_task first"),
        (lambda m: bl.end_task(m, -1), "freeze: expected a number of branches, got -1"),
        (lambda m: bl.add_branches(m, 0), "n: expected a positive number of branches, got 0"),
        (lambda m: bl.add_branches(m, 5000), "num_experts: expected"),
        (lambda m: bl.set_task(m, 1), r"task: expected numbers in \[0, 1\), got 1"),
        (lambda m: bl.set_task(m, [0, -1]), r"expected numbers in \[0, 1\), got \[0, -1\]"),
        (lambda m: bl.set_task(m, 0.5), r"expected a number or \(B,\) numbers"),
        (lambda m: bl.set_mask(m, MASK[0]), r"mask: expected \(B, L\), got \(6,\)"),
        (lambda m: bl.inject(m, bl.branch_lora(target_modules=("linear",))), "without branches"),
        (lambda m: bl.begin_task(nn.Linear(2, 2)), "expected one with branches"),
        (lambda m: bl.inject(Host(None), bl.branch_lora(), reads="last"), "reads: expected one of"),
        (
            lambda m: bl.inject(Host(None), LoraMoeConfig(target_modules=("linear",))),
            "config: expected shared_a=True",
        ),
        (lambda m: bl.moelora(8, 12), "r: expected a multiple of 8 experts, got 12"),
        (
            lambda m: (bl.set_task(m, [0, 0]), m(tokens())),
            "task_ids: expected 4, one per sample of the batch .*, got 2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(host())


@pytest.mark.parametrize("reads", ["first", "token"])
@pytest.mark.parametrize("name", MODELS)
def test_in_models_of_every_kind(name, reads):
    """Starts as the base; a step trains the trunk, a router and the branches that were picked."""
    model, batch, config = build(name)
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])}
    with torch.no_grad():
        want = model(**batch).logits
    targets = config.target_modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bl.inject(model, bl.branch_lora(E, R, K, target_modules=targets), reads=reads)
    bl.begin_task(model)
    assert torch.equal(model(**batch).logits, want)
    for layer in bl.branch_layers(model).values():
        for branch in bl.branches_of(layer):
            nn.init.normal_(branch, std=0.2)
    model(**batch).logits.square().mean().backward()
    for path, layer in bl.branch_layers(model).items():
        picked = set(layer.routing.indices.flatten().tolist())
        assert layer.lora_A.grad.any() and bl.routers_of(layer)[0].grad.any(), path
        rows = layer.lora_B.grad.unflatten(0, (E, -1)).flatten(1).any(1)
        assert set(rows.nonzero()[:, 0].tolist()) == picked, path


# --- presets ------------------------------------------------------------------------------------------


def test_moelora_is_its_formula():
    """y = W0 x + (alpha / r) sum_e softmax(W x)_e B_e A_e x, each expert of rank r / E."""
    torch.manual_seed(0)
    layer = lora_moe.LoraMoeLinear(nn.Linear(D_IN, D_OUT).double(), bl.moelora(4, 12, 30.0))
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.router_weight, std=0.5)
    x = tokens()[0].requires_grad_()
    gates = torch.softmax(x @ layer.router_weight.T, 1)
    want = nn.functional.linear(x, layer.weight, layer.bias)
    for e in range(4):
        rows = slice(3 * e, 3 * e + 3)
        want = want + 2.5 * gates[:, e, None] * (x @ layer.lora_A[rows].T @ layer.lora_B[rows])
    y, dy = layer(x), torch.randn(want.shape).double()
    assert relative_error(y, want) < 1e-12
    named = [x, layer.lora_A, layer.lora_B, layer.router_weight]
    for got, truth in zip(torch.autograd.grad(y, named, dy), torch.autograd.grad(want, named, dy)):
        assert relative_error(got, truth) < 1e-12


LLAVA_LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def llava_7b():
    """LLaVA-1.5-7B's shapes without its memory."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text)
        )


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameters_of_the_paper_on_llava_7b():
    """r = 16 x 8 in all seven linears of 32 layers, the projector tuned: 222.4 M and 349.9 M."""
    ins, outs = 6 * 4096 + 11008, 5 * 4096 + 2 * 11008  # of the seven linears together
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    model = llava_7b()
    with pytest.warns(UserWarning, match="mean"):
        bl.inject(
            model,
            bl.branch_lora(target_modules=LLAVA_LINEARS),
            also=("model.multi_modal_projector",),
        )
    bl.begin_task(model)
    assert len(bl.branch_layers(model)) == 224
    assert trainable(model) == 32 * (16 * ins + 8 * 16 * outs + 8 * ins) + projector == 222_371_840
    assert next(iter(bl.branch_layers(model).values())).scales[0] == 2.0
    bl.end_task(model, 0)
    bl.begin_task(model)
    assert trainable(model) == 222_371_840  # one router trains at a time

    model = llava_7b()
    lora_moe.inject(model, bl.moelora(target_modules=LLAVA_LINEARS))
    model.model.multi_modal_projector.requires_grad_(True)
    assert trainable(model) == 32 * (128 * (ins + outs) + 8 * ins) + projector == 349_904_896


# --- the state on disk --------------------------------------------------------------------------------


def life(model, steps):
    """Two tasks, new branches, and a third task up to its middle; returns its optimizer."""
    for task in range(2):
        if task:
            bl.begin_task(model)
        learn(model, steps, task)
        bl.end_task(model)
    bl.add_branches(model, 2)
    bl.begin_task(model)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


class Projected(Host):
    def __init__(self, dtype):
        super().__init__(dtype)
        self.projector = nn.Linear(D_IN, D_IN, dtype=dtype)

    def forward(self, x, attention_mask=None):
        return super().forward(self.projector(x))


def projected():
    torch.manual_seed(0)
    return Projected(torch.float32)


def begun():
    model = projected()
    config = bl.branch_lora(E, R, K, 30.0, target_modules=("linear",))
    bl.inject(model, config, also=("projector",))
    bl.begin_task(model)
    randomise(model)
    return model


def selector_of(tasks):
    selector = TaskSelector(6, 4)
    g = torch.Generator().manual_seed(0)
    for _ in range(tasks):
        selector.begin_task()
        selector.observe(torch.randn(5, 6, generator=g), torch.randn(5, 4, generator=g))
    return selector


def test_state_survives_save_and_load_in_the_middle_of_a_task(tmp_path):
    model = begun()
    optimizer = life(model, 2)
    for i in range(3):
        step(model, optimizer, 50 + i)
    bl.save(model, tmp_path, selector_of(3))

    other = projected()
    selector = bl.load(other, tmp_path)
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    resumed = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.02)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        for i in range(3):
            step(m, o, 60 + i)
        bl.end_task(m)
        bl.begin_task(m)
    assert model.linear.frozen == other.linear.frozen and model.linear.frozen
    for (name, tensor), (_, twin) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        if "router_weight_3" not in name:  # drawn anew
            assert torch.equal(tensor, twin), name
    for task in (0, 1, 2, [0, 1, 2, 0]):
        bl.set_task(model, task), bl.set_task(other, task)
        x = tokens(torch.float32)
        assert torch.equal(model(x, MASK), other(x, MASK))
    for name, keys in selector_of(3).named_buffers():
        assert torch.equal(keys, selector.get_buffer(name))


def rewrite(folder, change=lambda tensors, description: None):
    """The saved file with something changed in it."""
    path = Path(folder) / bl.FILE_NAME
    with safefile.open_regular(path) as file:
        metadata, slices = safefile.read_header(file)
        tensors = {key: safefile.read_tensor(file, s) for key, s in slices.items()}
    description = json.loads(metadata["branch_lora"])
    change(tensors, description)
    safefile.write(path, tensors, {"format": "pt", "branch_lora": json.dumps(description)})


CHANGES = {
    "a tensor is missing": (lambda t, d: t.pop("linear.routers.0"), "linear.routers.0: missing"),
    "one too many": (lambda t, d: t.update(x=torch.ones(2)), "'x': not the model's"),
    "a shape": (lambda t, d: t.update({"linear.usage": torch.ones(3)}), r"usage: expected \(7,\)"),
    "NaN": (lambda t, d: t["linear.lora_A"].fill_(torch.nan), "lora_A: expected finite values"),
    "no selector's image": (lambda t, d: t.pop("selector.image_keys"), None),
    "no text": (lambda t, d: t.pop("selector.text_keys"), "selector.text_keys: missing"),
    "a module": (lambda t, d: d.update(frozen={"linear.nothing": []}), "no such module"),
    "not linear": (lambda t, d: d.update(frozen={"": []}), "cannot be replaced"),
    "frozen what is not": (lambda t, d: d.update(frozen={"linear": [7]}), "consistent state"),
    "a task without router": (lambda t, d: d.update(bank=[0, 1, 3]), "consistent state"),
    "routers of nothing": (lambda t, d: d.update(routers=[5, 9, 7]), "consistent state"),
    "many branches": (lambda t, d: d.update(branches=10**9), "consistent state"),
    "an open task of none": (lambda t, d: d.update(bank=[], routers=[]), "consistent state"),
    "another version": (lambda t, d: d.update(version=2), "expected version 1, got 2"),
    "an unknown field": (lambda t, d: d.update(more=1), "expected the fields"),
    "a wrong type": (lambda t, d: d.update(learning=1), "expected the fields"),
    "a wrong reading": (lambda t, d: d.update(reads="last"), "consistent state"),
    "no projector": (lambda t, d: d.update(also=["elsewhere"]), "elsewhere: no such module"),
    "a wild configuration": (lambda t, d: d["config"].update(r=10**6), "r: expected"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused_and_the_model_is_as_it_was(tmp_path, name):
    change, message = CHANGES[name]
    model = begun()
    life(model, 1)
    bl.save(model, tmp_path, selector_of(3))
    rewrite(tmp_path, change)
    other = projected()
    before = {n: (p.clone(), p.requires_grad) for n, p in other.named_parameters()}
    if message is None:
        assert bl.load(other, tmp_path).image_keys is None
        return
    with pytest.raises(ValueError, match=message):
        bl.load(other, tmp_path)
    after = dict(other.named_parameters())
    assert after.keys() == before.keys() and not other._forward_pre_hooks
    assert all(
        torch.equal(after[n], p) and after[n].requires_grad == g for n, (p, g) in before.items()
    )


def test_an_ordinary_adapter_is_no_state_and_a_full_model_takes_none(tmp_path):
    model = begun()
    bl.save(model, tmp_path)
    assert bl.load(projected(), tmp_path) is None
    with pytest.raises(ValueError, match="already has experts"):
        bl.load(begun(), tmp_path)
    safefile.write(tmp_path / bl.FILE_NAME, {"x": torch.ones(1)}, {"format": "pt"})
    with pytest.raises(ValueError, match="it is no branch_lora file"):
        bl.load(projected(), tmp_path)


# --- selector and metrics -----------------------------------------------------------------------------


def test_keys_are_where_the_gradient_of_the_loss_leads():
    g = torch.Generator().manual_seed(0)
    text, image = torch.randn(40, 6, generator=g) + 1, torch.randn(40, 4, generator=g) - 1
    selector = TaskSelector(6, 4)
    selector.begin_task()
    for rows in torch.arange(40).split(7):
        selector.observe(text[rows], image[rows])
    keys = [torch.randn(n, generator=g, requires_grad=True) for n in (6, 4)]
    optimizer = torch.optim.Adam(keys, lr=0.05)
    for _ in range(800):
        cosines = [nn.functional.cosine_similarity(e, k[None]) for e, k in zip((text, image), keys)]
        loss = sum((1 - c).sum() for c in cosines)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss = loss.item()
    assert loss == pytest.approx(float(selector.loss(text, image)), rel=1e-5)
    assert float(selector.loss(text, image, 0.5)) == pytest.approx(loss / 2, rel=1e-5)
    for key, own in zip(keys, (selector.text_keys[0], selector.image_keys[0])):
        assert nn.functional.cosine_similarity(key, own, 0).item() > 1 - 1e-5


def test_the_nearest_key_picks_the_task():
    selector = TaskSelector(3, 2)
    for text, image in (([1.0, 0, 0], [1.0, 0]), ([0, 2.0, 0], [0, 3.0])):
        selector.begin_task()
        selector.observe(torch.tensor([text]), torch.tensor([image]))
    text = torch.tensor([[0.9, 0.5, 0], [0.2, 0.1, 5], [0.6, 0.8, 0]])
    assert selector(text).tolist() == [0, 0, 1]
    image = torch.tensor([[0.0, 1], [0, 1], [1, 0]])  # the picture is surer than the text
    assert selector(text, image).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"text: expected \(B, 3\), got \(3, 2\)"):
        selector(image)
    with pytest.raises(ValueError, match="without image_dim"):
        TaskSelector(3).observe(text, image)
    with pytest.raises(ValueError, match="begin_task"):
        TaskSelector(3)(text)


def test_metrics_by_hand():
    found = continual_metrics([[0.8], [0.6, 0.9], [0.5, 0.7, 0.6]])
    assert found.acc == pytest.approx(0.6)
    assert found.maa == pytest.approx((0.8 + 0.75 + 0.6) / 3)
    assert found.bwt == pytest.approx((-0.3 - 0.2) / 2)
    assert continual_metrics([[0.7, 0.1]]) == (0.7, 0.7, 0.0)
    with pytest.raises(ValueError, match="row i"):
        continual_metrics([[0.8], [0.6]])
    with pytest.raises(ValueError, match="row i"):
        continual_metrics([])


# --- what the documentation shows -----------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def test_the_example_of_the_page(tmp_path, monkeypatch):
    page = (ROOT / "docs/branch_lora.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(block.splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block, scope)
    assert [len(row) for row in scope["accuracy"]] == [3, 3, 3]
    assert (tmp_path / "state" / bl.FILE_NAME).is_file()
    assert scope["answers"].shape == (4, 10)
    assert len(bl.routers_of(next(iter(bl.branch_layers(scope["model"]).values())))) == 3
