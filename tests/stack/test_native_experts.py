"""LoRA on an MoE model's own fused experts: results equal PEFT's target_parameters, at less memory."""

import contextlib
import importlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_moe import (
    disable_adapters,
    inject,
    injected,
    ops,
)

from ..support.interpreter import interpreting
from ..support.models import moes
from ..support.through import through

every_family = pytest.mark.parametrize("family", moes.FAMILIES)
TOKENS = moes.TOKENS
with interpreting() if not torch.cuda.is_available() else contextlib.nullcontext():
    TRITON = importlib.import_module("lora_moe.triton_kernels")


def gradients(layer, x, ids, weights):
    """[y, gradients of x, of the router's weights and of the adapter]."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = layer(x, ids, weights)
    own = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, weights, *own])]


@every_family
@pytest.mark.parametrize("kernels", ["serving", "triton", "reference"])
def test_formula_on_every_backend(family, kernels):
    layer, x, ids, weights = moes.layer(family)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    own = [x, weights, *layer.adapter_state().values()]
    wanted = moes.literal(layer, x, ids, weights)
    expected = torch.autograd.grad(wanted.sin().sum(), own)
    with contexts(kernels):
        y = layer(x, ids, weights)
        found = torch.autograd.grad(y.sin().sum(), own)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def contexts(kernels):
    if kernels == "triton":
        return through(TRITON)
    return through(Reference()) if kernels == "reference" else contextlib.nullcontext()


class Reference:
    """Plain PyTorch in place of a backend's kernels."""

    def __getattr__(self, name):
        return ops.reference_operator(name)


@every_family
def test_equals_peft(family):
    """Logits agree within 1e-5, gradients of all LoRA parameters within 1e-4 of the largest."""
    model = moes.ours(family)
    theirs = moes.peft_of(model)
    a, b = model(TOKENS, labels=TOKENS), theirs(TOKENS, labels=TOKENS)
    assert (a.logits - b.logits).abs().max() < 1e-5
    with disable_adapters(model):
        assert (model(TOKENS).logits - a.logits).abs().max() > 0.1
    a.loss.backward()
    b.loss.backward()
    compared = 0
    for path, layer in injected(model).items():
        for name, wrapper in moes.wrappers_of(theirs, path).items():
            dA, dB = (getattr(layer, f"lora_{letter}_{name}").grad for letter in "AB")
            theirs_dA, theirs_dB = (
                lora["default"].weight.grad for lora in (wrapper.lora_A, wrapper.lora_B)
            )
            for found, expected in ((dA, theirs_dA), (moes.as_peft_has(dB), theirs_dB)):
                assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
                compared += 1
    assert compared == 8


@every_family
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_starts_as_the_base(family, implementation):
    """Equal bit for bit with "grouped_mm", up to rounding with other implementations of the base."""
    model = moes.base(family)
    model.set_experts_implementation(implementation)
    expected = model(TOKENS).logits
    got = inject(model, moes.config())(TOKENS).logits
    if implementation == "grouped_mm":
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_rslora_one_parameter_and_dropout():
    model = moes.ours(use_rslora=True, target_parameters=("experts.down_proj",), dropout=0.5)
    theirs = moes.peft_of(model, targets=("experts.down_proj",), use_rslora=True)
    model.eval()
    assert (model(TOKENS).logits - theirs(TOKENS).logits).abs().max() < 1e-5
    assert (model.train()(TOKENS).logits - theirs(TOKENS).logits).abs().max() > 1e-3
    layer = next(iter(injected(model).values()))
    assert list(layer.adapter_state()) == ["lora_A_down_proj", "lora_B_down_proj"]


def test_bf16_base_keeps_fp32_adapters():
    model = inject(moes.base().bfloat16(), moes.config())
    layer = next(iter(injected(model).values()))
    assert layer.lora_A_down_proj.dtype == torch.float32
    model(TOKENS, labels=TOKENS).loss.backward()
    assert layer.lora_B_down_proj.grad.abs().max() > 0
    narrow = inject(moes.base().bfloat16(), moes.config(adapter_dtype="base"))
    assert next(iter(injected(narrow).values())).lora_A_down_proj.dtype == torch.bfloat16


def test_autocast_runs():
    model = moes.ours()
    expected = model(TOKENS).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(TOKENS, labels=TOKENS)
    out.loss.backward()
    assert (out.logits - expected).abs().max() < 0.1


class Allocations(TorchDispatchMode):
    """Records the sizes of all tensors that operators allocate."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.made.append(t.numel())
        return out


@every_family
def test_makes_nothing_of_the_size_of_the_experts(family):
    layer, x, ids, weights = moes.layer(family)
    stack = min(layer.base_layer.gate_up_proj.numel(), layer.base_layer.down_proj.numel())
    with Allocations() as allocations:
        gradients(layer, x, ids, weights)
    assert max(allocations.made) < stack
    theirs = moes.peft_of(moes.ours(family)).base_model.model.model.layers[0].mlp.experts
    with Allocations() as allocations:
        gradients(theirs, x, ids, weights)
    assert max(allocations.made) >= stack  # the counter works


@every_family
def test_generates_with_a_cache_what_the_whole_forward_says(family):
    model = moes.ours(family).eval()
    mask = torch.ones_like(TOKENS)
    kept = model.generate(TOKENS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    tokens = TOKENS
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(kept, tokens)


@every_family
def test_gradient_checkpointing_changes_nothing(family):
    model = moes.ours(family).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 8
    for a, b in zip(*found):
        assert torch.equal(a, b)


@every_family
def test_compiles_without_graph_breaks(family):
    layer, *given = moes.layer(family)
    expected = gradients(layer, *given)
    sizes = []

    def note(graph, _):
        calls = [n for n in graph.graph.nodes if n.op == "call_function"]
        made = [n.meta.get("val") for n in calls if not getattr(n.target, "is_view", False)]
        made = [v for val in made for v in (val if isinstance(val, tuple | list) else [val])]
        sizes.extend(v.numel() for v in made if isinstance(v, torch.Tensor))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled, *given), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert sizes and max(sizes) < layer.base_layer.down_proj.numel()
    assert layer.routing.counts.sum() == 18


def test_checkpoint_of_the_layer_alone():
    layer, x, ids, weights = moes.layer()
    expected = gradients(layer, x, ids, weights)
    wrapped = nn.Module()
    wrapped.layer = layer
    wrapped.forward = lambda *given: checkpoint(layer, *given, use_reentrant=False)
    for a, b in zip(gradients(wrapped, x, ids, weights), expected):
        assert torch.equal(a, b)
