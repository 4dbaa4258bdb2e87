"""LoRA on an MoE model's own fused experts: equals PEFT's target_parameters, and what works with it."""

import contextlib
import copy
import importlib
import pickle

import accelerate
import pytest
import torch
import transformers as hf
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_moe import (
    LoraMoeConfig,
    LoraMoeExperts,
    LoraMoeLinear,
    aux_loss,
    disable_adapters,
    freeze_experts,
    inject,
    injected,
    load_adapter,
    merge,
    ops,
    remove,
    router_stats,
    save_adapter,
    use_routing,
    warm_up,
)
from lora_moe.native import LoraMoeExperts as Native
from lora_moe.routing import Routing
from lora_moe.vllm.rules import refusal

from ..support.interpreter import interpreting
from ..support.models import moes, tiny
from ..support.through import through

every_family = pytest.mark.parametrize("family", moes.FAMILIES)
TOKENS = moes.TOKENS
with interpreting() if not torch.cuda.is_available() else contextlib.nullcontext():
    TRITON = importlib.import_module("lora_moe.triton_kernels")


def gradients(layer, x, ids, weights):
    """y, and the gradients of x, the router's weights and the adapter."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = layer(x, ids, weights)
    own = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, weights, *own])]


# --- the formula -----------------------------------------------------------------------------------


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
    """Plain PyTorch in the place of a backend's kernels."""

    def __getattr__(self, name):
        return ops.reference_operator(name)


@every_family
def test_equals_peft(family):
    """Logits to 1e-5, gradients to 1e-4 of the largest, of all LoRA parameters of both layers."""
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
    """Bit for bit with "grouped_mm"; whatever computes the base, to rounding."""
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


# --- what runs on it -------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Sizes of all tensors that operators make anew."""

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
    assert max(allocations.made) >= stack  # the count counts


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


def test_statistics_are_the_models_decision():
    """router_stats, without padding; the model's own loss is as before and ours adds nothing, and says so."""
    model = moes.ours().train()
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    out = model(TOKENS, attention_mask=mask, labels=TOKENS, output_router_logits=True)
    ids = out.router_logits[0].topk(2).indices[mask.flatten().bool()]
    load = torch.bincount(ids.flatten(), minlength=moes.E) / ids.numel()
    stats = router_stats(model)["model.layers.0.mlp.experts"]
    torch.testing.assert_close(stats["load"].float(), load)
    assert stats["entropy"] is None
    assert out.aux_loss > 0
    with pytest.warns(
        UserWarning, match="the model's own router decides.*output_router_logits=True"
    ):
        assert aux_loss(model) == 0


def test_a_router_trains_as_a_whole():
    model = moes.ours(modules_to_save=("mlp.gate",)).train()
    out = model(TOKENS, labels=TOKENS, output_router_logits=True)
    out.loss.backward()
    gate = model.model.layers[0].mlp.gate.weight
    assert gate.requires_grad and gate.grad.abs().max() > 0
    assert not model.model.layers[0].mlp.experts.base_layer.down_proj.requires_grad


def test_replays_a_decision_and_leaves_the_router_to_the_model():
    model = moes.ours().eval()
    expected = model(TOKENS).logits
    replay = {path: layer.routing for path, layer in injected(model).items()}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.neg_()
        assert not torch.allclose(model(TOKENS).logits, expected, atol=1e-3)
        with use_routing(model, routing=replay):
            torch.testing.assert_close(model(TOKENS).logits, expected)
    beyond = Routing.from_ids(torch.full((14, 2), moes.E), num_experts=moes.E)
    too_high = pytest.raises(ValueError, match=r"expert ids in \[-1, 4\), got 4")
    with use_routing(model, routing=dict.fromkeys(replay, beyond)), too_high:
        model(TOKENS)
    for said in ({"task_ids": torch.tensor([0, 1])}, {"routing": next(iter(replay.values()))}):
        refused = pytest.raises(ValueError, match="the model's own router decides")
        with refused, use_routing(model, **said):
            pass


def test_frozen_experts_do_not_move():
    model = moes.ours().train()
    layer = next(iter(injected(model).values()))
    freeze_experts(model, [1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    before = {name: t.detach().clone() for name, t in layer.adapter_state().items()}
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    rows = slice(moes.R, 2 * moes.R)
    for name, t in layer.adapter_state().items():
        assert not t.grad[rows].any() and t.grad.any()
        assert torch.equal(t[rows], before[name][rows]) and not torch.equal(t, before[name])


def test_a_plain_trainer_trains_saves_and_resumes(tmp_path):
    """Bit for bit, also where save_pretrained would unfuse the weights, as with Mixtral."""

    def train(model, folder, **options):
        arguments = hf.TrainingArguments(
            str(tmp_path / folder), max_steps=4, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = hf.Trainer(model, arguments, train_dataset=tiny.sequences(8))
        trainer.train(**options)
        return model

    start = moes.ours(modules_to_save=("mlp.gate",))
    once = train(copy.deepcopy(start), "once")
    resumed = train(
        copy.deepcopy(start), "two", resume_from_checkpoint=str(tmp_path / "once/checkpoint-2")
    )
    own = start.state_dict()
    for name, value in once.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        trains = "lora_" in name or ".gate." in name
        assert torch.equal(own[name], value) != trains, name


def test_hooks_of_a_device_map_stay(tmp_path):
    model = moes.ours()
    expected = model(TOKENS).logits
    save_adapter(model, tmp_path)
    base = accelerate.dispatch_model(moes.base_of(model), {"": "cpu"}, force_hooks=True)
    assert torch.equal(load_adapter(base, tmp_path)(TOKENS).logits, expected)


def test_our_trainer_reports_the_models_routers(tmp_path):
    from lora_moe.hf import LoraMoeTrainer

    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    model = moes.ours()
    trainer = LoraMoeTrainer(model, arguments, train_dataset=tiny.sequences(4))
    trainer.train()
    assert trainer.state.log_history[0]["router/max_over_mean"] > 1
    with pytest.raises(ValueError, match="router_learning_rate: expected routers that train"):
        LoraMoeTrainer(
            model, arguments, router_learning_rate=0.1, train_dataset=tiny.sequences(4)
        ).train()


# --- in and out ------------------------------------------------------------------------------------


@every_family
def test_save_load_and_remove(family, tmp_path):
    model = moes.ours(family)
    bare = moes.base_of(model)
    expected, before = model(TOKENS).logits, bare(TOKENS).logits
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(bare), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, expected)
    other = inject(bare, moes.config())
    assert torch.equal(load_adapter(other, tmp_path)(TOKENS).logits, expected)
    assert torch.equal(remove(loaded)(TOKENS).logits, before)
    assert not injected(loaded)


@every_family
def test_save_pretrained_keeps_the_base(family, tmp_path):
    model = moes.ours(family)
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with disable_adapters(model):
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(load_adapter(again, tmp_path)(TOKENS).logits, expected)


def test_warm_up_runs_one_layer_of_a_kind():
    model = moes.ours()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert warm_up(model, tokens=(1, 5)) == 1
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(layer.routing is None for layer in injected(model).values())
    assert all(p.grad is None for p in model.parameters())


def test_copies_pickles_and_state_dicts():
    model = moes.ours()
    expected = model(TOKENS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(TOKENS).logits, expected)
    fresh = inject(moes.base(), moes.config())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS).logits, expected)
    fresh.load_state_dict(moes.base_of(model).state_dict(), strict=False)  # the base's own names
    assert torch.equal(fresh(TOKENS).logits, expected)


def test_beside_a_mixture_on_linear_modules(tmp_path):
    """Two configurations in one call: experts of ours on attention, LoRAs on the model's own."""
    attention = LoraMoeConfig(num_experts=3, r=2, target_modules=("q_proj",))
    model = inject(moes.base(), [attention, moes.config()]).train()
    kinds = {type(layer) for layer in injected(model).values()}
    assert kinds == {LoraMoeLinear, LoraMoeExperts} and Native is LoraMoeExperts
    model(TOKENS, labels=TOKENS)
    assert aux_loss(model) > 0 and len(router_stats(model)) == 4
    with use_routing(model, task_ids=torch.tensor([0, 1])):
        model(TOKENS)
    save_adapter(model, tmp_path)
    assert torch.equal(
        load_adapter(moes.base(), tmp_path)(TOKENS).logits, model.eval()(TOKENS).logits
    )


# --- what is refused -------------------------------------------------------------------------------


REFUSED = {
    "number": (
        {"num_experts": 3},
        "num_experts: expected 4, the number of the model's own experts",
    ),
    "nothing": ({"target_parameters": ("nowhere",)}, "nothing matches.*mlp.experts.gate_up_proj"),
    "router": (
        {"target_parameters": ("mlp.gate.weight",)},
        "weight of a MixtralTopKRouter is one matrix",
    ),
    "linear": ({"target_parameters": ("q_proj.weight",)}, "name a linear module in target_modules"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_inject_refuses(fields, message):
    model = moes.base()
    with pytest.raises(ValueError, match=message):
        inject(model, moes.config(**fields))
    assert not injected(model) and all(p.requires_grad for p in model.parameters())


CONFIGURATIONS = {
    "top_k": ({"top_k": 2}, "top_k: expected None with target_parameters"),
    "gate": ({"gate": "sigmoid"}, "gate: expected 'softmax' with target_parameters"),
    "shared": ({"shared_a": True}, "shared_a: expected False with"),
    "balance": (
        {"balance_coef": 0.5},
        "balance_coef: expected 0 with target_parameters, as the model has",
    ),
    "placement": ({"placement": "ffn"}, "placement: expected 'linear' with target_parameters"),
    "modules": ({"target_modules": ("q_proj",)}, "pass inject a list of two configurations"),
    "ranks": ({"r": (1, 2, 3, 4)}, "num_experts: expected the model's number of experts"),
}


@pytest.mark.parametrize("fields, message", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        moes.config(**fields)


def test_a_name_that_matches_nothing_is_told():
    with pytest.warns(UserWarning, match=r"no parameter matches 'experts\.up_proj'") as told:
        inject(moes.base(), moes.config(target_parameters=("experts.down_proj", "experts.up_proj")))
    assert told[0].filename == __file__


def test_what_cannot_take_experts_is_refused():
    def refused(prepare, match):
        model = moes.base()
        prepare(model.model.layers[0].mlp.experts)
        with pytest.raises(ValueError, match=match):
            inject(model, moes.config())

    def quantise(experts):
        data = experts.down_proj.detach().to(torch.float8_e4m3fn)
        experts.down_proj = nn.Parameter(data, requires_grad=False)

    refused(quantise, r"quantised \(torch.float8_e4m3fn\): load the model in bfloat16")
    refused(lambda e: setattr(e, "_is_expert_parallel", True), "expert parallelism")
    model = moes.base()
    model.config._experts_implementation = "someones_own"
    with pytest.raises(ValueError, match="experts_implementation='someones_own' is not known"):
        inject(model, moes.config())
    twice = moes.ours()
    with pytest.raises(ValueError, match="already has experts"):
        inject(twice, moes.config())
    with pytest.raises(ValueError, match="the model's own experts; to_peft writes"):
        merge(twice, [1.0] * moes.E)
    offloaded = moes.base()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="accelerate offloads its weights"):
        inject(offloaded, moes.config())
    with pytest.raises(ValueError, match=r"expected some of \('gate_up_proj', 'down_proj'\)"):
        LoraMoeExperts(
            moes.base().model.layers[0].mlp.experts, moes.config(target_parameters=("w",))
        )
    assert "only linear layers are supported" in refusal(moes.config(num_experts=4))
    with pytest.raises(TypeError, match="fused experts, got something else"):
        LoraMoeExperts(nn.Linear(3, 3), moes.config())


def test_checkpoint_of_the_layer_alone():
    layer, x, ids, weights = moes.layer()
    expected = gradients(layer, x, ids, weights)
    wrapped = nn.Module()
    wrapped.layer = layer
    wrapped.forward = lambda *given: checkpoint(layer, *given, use_reentrant=False)
    for a, b in zip(gradients(wrapped, x, ids, weights), expected):
        assert torch.equal(a, b)
