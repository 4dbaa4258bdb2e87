"""C-LoRAE's layer against its formula, with PyTorch's features, and in a T5 that trains."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_moe
from lora_moe import functional as F
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import CLoraeConfig, CollaborativeLinear, add_visual, set_images
from lora_moe.methods.c_lorae.information import Pooling

from ..support.compare import relative_error
from ..support.interpreter import interpreting
from ..support.through import through

D_IN, D_OUT = 20, 14
TASKS = torch.tensor([2, 0, -1, 1, 0])  # of five samples; the third has none
CONFIGS = {
    "softmax": CLoraeConfig(num_tasks=3, r=7, alpha=5),
    "sigmoid": CLoraeConfig(num_tasks=3, r=7, alpha=5, gate="sigmoid"),
    "one-scale": CLoraeConfig(num_tasks=3, r=7, alpha=5, task_alpha=5 * 2 / 7),
    "plain-sum": CLoraeConfig(num_tasks=3, r=7, alpha=5, gate="sum"),
    "universal-only": CLoraeConfig(num_tasks=0, r=7, alpha=5),
    "one-lora": CLoraeConfig(num_tasks=3, r=7, alpha=5).one_lora(),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
fp64 = pytest.mark.skipif(
    lora_moe.backend.serving("cpu") == "triton", reason="Triton serves no fp64"
)


def make(config=CONFIGS["softmax"], dtype=torch.float64, seed=0):
    """A layer whose B is of order one and whose gate is undecided about nothing."""
    torch.manual_seed(seed)
    layer = CollaborativeLinear(nn.Linear(D_IN, D_OUT, dtype=dtype), config)
    nn.init.normal_(layer.lora_B, std=0.5)
    if layer.router_weight is not None:
        nn.init.normal_(layer.router_weight, std=0.5)
    c_lorae.set_tasks(layer, TASKS)
    return layer


def samples(dtype=torch.float64, length=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(len(TASKS), length, D_IN, generator=g, dtype=torch.float64).to(dtype)


def adapter(layer):
    return dict(layer.named_parameters(recurse=False))


def by_hand(config, layer, x):
    """The formula, token by token, in fp64 on copies of the parameters; (y, leaves)."""
    p = {n: t.detach().double().requires_grad_() for n, t in adapter(layer).items()}
    x = x.detach().double().requires_grad_()
    starts = [sum(config.ranks[:e]) for e in range(len(config.ranks) + 1)]

    def expert(e, token):
        rows = slice(starts[e], starts[e + 1])
        alpha = config.task_alpha if e and config.task_alpha else config.alpha
        scale = alpha / config.ranks[e]
        return scale * p["lora_B"][rows].T @ (p["lora_A"][rows] @ token)

    y = []
    for sample, task in zip(x, TASKS.tolist(), strict=True):
        for token in sample:
            g = torch.ones(2, dtype=torch.float64)
            if config.gated:
                logits = p["router_weight"] @ token
                g = logits.softmax(0) if config.gate == "softmax" else logits.sigmoid()
            out = layer.weight.double() @ token + layer.bias.double() + g[0] * expert(0, token)
            if config.num_tasks and task >= 0:
                out = out + g[1] * expert(1 + task, token)
            y.append(out)
    return torch.stack(y).view(*x.shape[:2], D_OUT), p | {"x": x}


def forward_and_gradients(config, x):
    """{name: tensor} of the layer, and the same by hand."""
    layer = make(config)
    x = x.requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    truth, leaves = by_hand(config, layer, x)
    truth.backward(dy)
    ours = {"y": y, "x": x.grad} | {name: p.grad for name, p in adapter(layer).items()}
    return ours, {"y": truth} | {name: leaf.grad for name, leaf in leaves.items()}


@fp64
@every_config
def test_equals_the_formula(config):
    ours, truth = forward_and_gradients(config, samples())
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert relative_error(value, truth[name]) < 1e-12, name


@every_config
def test_equals_the_formula_on_interpreted_triton(config):
    pytest.importorskip("triton")
    interpreted = not torch.cuda.is_available()
    with interpreting() if interpreted else contextlib.nullcontext():
        kernels = importlib.import_module("lora_moe.triton_kernels")
    with through(kernels):
        layer = make(config, torch.float32)
        x = samples(torch.float32).requires_grad_()
        y = layer(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        y.backward(dy.float())
    truth, leaves = by_hand(config, layer, x)
    truth.backward(dy)
    assert relative_error(y, truth) < 1e-6
    for name, p in {"x": x, **adapter(layer)}.items():
        assert relative_error(p.grad, leaves[name].grad) < 3e-6, name


def test_both_experts_of_every_task_run_in_one_call():
    layer = make(dtype=torch.float32)
    with mock.patch.object(F, "grouped_lora", wraps=F.grouped_lora) as call:
        layer(samples(torch.float32))
    assert call.call_count == 1
    routing = call.call_args.args[3]
    assert routing.indices.shape == (20, 2)
    assert [sorted(row) for row in routing.indices[::4].tolist()] == [
        [0, 3], [0, 1], [-1, 0], [0, 2], [0, 1],
    ]  # fmt: skip
    assert torch.allclose(routing.weights.sum(1), torch.ones(20))


def test_starts_as_the_base_and_other_tasks_experts_get_no_gradient():
    layer, x = make(dtype=torch.float32), samples(torch.float32)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer = make(dtype=torch.float32)
    c_lorae.set_tasks(layer, torch.ones(5, dtype=torch.long))
    layer(x).sum().backward()
    rows = layer.lora_B.grad.any(1)
    assert rows[:7].all() and rows[9:11].all() and not rows[7:9].any() and not rows[11:].any()


def test_baselines_have_as_many_parameters():
    config = CLoraeConfig(num_tasks=3, r=24, alpha=24)
    ours = CollaborativeLinear(nn.Linear(576, 1536), config)
    one = CollaborativeLinear(nn.Linear(576, 1536), config.one_lora())
    count = [sum(p.numel() for p in adapter(layer).values()) for layer in (ours, one)]
    assert ours.config.ranks == (24, 8, 8, 8)
    assert count == [48 * (576 + 1536) + 2 * 576, 49 * (576 + 1536)]
    assert count[0] <= count[1] < 1.02 * count[0]
    assert one.scales[0] == ours.scales[0]


# --- inside PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_with_the_same_tasks(reentrant):
    layer = make(dtype=torch.float32)

    def gradients(run):
        layer.zero_grad()
        x = samples(torch.float32).requires_grad_()
        run(x).square().sum().backward()
        return [x.grad, *(p.grad for p in adapter(layer).values())]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))


def test_compiles_whole():
    layer = make(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (3, 5):
        x = samples(torch.float32, length)
        assert relative_error(compiled(x), layer(x)) < 1e-6


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_tasks(duplicate):
    layer = make(dataclasses.replace(CONFIGS["softmax"], mutual_information=True), torch.float32)
    x = samples(torch.float32)
    y = layer(x)
    other = duplicate(layer)
    (pooling,) = Pooling.of(other)
    assert pooling.layer is other and pooling.mean is None
    assert torch.equal(other(x), y) and pooling.mean is not None


def test_dropout_spares_the_gate():
    layer = make(dataclasses.replace(CONFIGS["softmax"], dropout=0.5), torch.float32)
    x = samples(torch.float32)
    first, second = layer(x), layer(x)
    weights = layer.routing.weights
    assert not torch.equal(first, second)
    layer.eval()(x)
    assert torch.equal(layer.routing.weights, weights)


def test_half_precision_base_with_fp32_experts():
    layer = make(dtype=torch.float32)
    truth = layer(samples(torch.float32))
    layer.base_layer.bfloat16()
    y = layer(samples(torch.float32).bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, truth) < 0.02
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


# --- mutual information --------------------------------------------------------------------------


@fp64
@pytest.mark.parametrize("negatives", ["batch", "task"])
def test_mutual_information_loss_equals_the_formula(negatives):
    layer = make(dataclasses.replace(CONFIGS["softmax"], mutual_information=True))
    x = samples().requires_grad_()
    layer(x)
    loss = c_lorae.mutual_information_loss(layer, temperature=0.2, negatives=negatives)
    a, b, ranks = layer.lora_A, layer.lora_B, layer.config.ranks
    rows = torch.arange(sum(ranks)).split(list(ranks))

    def mean_output(e, sample):
        token_outputs = (5 / ranks[e]) * (sample @ a[rows[e]].T) @ b[rows[e]]  # (L, D_out)
        mean = token_outputs.mean(0)
        return mean / (mean.square().sum() + 1e-4).sqrt()

    kept = [i for i, task in enumerate(TASKS.tolist()) if task >= 0]
    u = [mean_output(0, x[i]) for i in kept]
    d = [mean_output(1 + int(TASKS[i]), x[i]) for i in kept]
    task, want, pairs = TASKS[kept].tolist(), 0, 0
    for i in range(len(kept)):
        others = [j for j in range(len(kept)) if negatives == "batch" or task[j] == task[i]]
        scores = torch.stack([u[i] @ d[j] for j in others]) / 0.2
        own = scores[others.index(i)]
        want, pairs = (
            want - torch.log(own.exp() / scores.exp().sum()) / len(kept),
            pairs + len(others),
        )
    assert len(kept) < pairs and (pairs < len(kept) ** 2) == (negatives == "task")
    assert relative_error(loss, want) < 1e-12
    leaves = (x, a, b)
    ours, truth = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (loss, want))
    for one, other in zip(ours, truth, strict=True):
        assert relative_error(one, other) < 1e-11


def test_mutual_information_rises_in_training_and_starts_with_a_finite_gradient():
    config = dataclasses.replace(CONFIGS["softmax"], mutual_information=True)
    torch.manual_seed(0)
    layer, x = CollaborativeLinear(nn.Linear(D_IN, D_OUT), config), samples(torch.float32)
    c_lorae.set_tasks(layer, TASKS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    trace = []
    for _ in range(40):
        layer(x)
        loss = c_lorae.mutual_information_loss(layer)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B))
        nn.init.normal_(layer.lora_B, std=0.1) if len(trace) == 0 else optimizer.step()
        trace.append(loss.item())
    assert trace[0] == pytest.approx(
        torch.tensor(4.0).log().item(), abs=1e-5
    )  # four samples, B = 0
    assert trace[-1] < 0.5 * trace[1]


def test_mutual_information_needs_its_option_and_a_forward():
    with pytest.raises(ValueError, match="mutual_information=True"):
        c_lorae.mutual_information_loss(make(dtype=torch.float32))
    layer = make(dataclasses.replace(CONFIGS["softmax"], mutual_information=True))
    with pytest.raises(RuntimeError, match="forward"):
        c_lorae.mutual_information_loss(layer)
    layer(samples())
    with pytest.raises(ValueError, match="negatives: expected one of"):
        c_lorae.mutual_information_loss(layer, negatives="tasks")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tasks": -1}, "num_tasks: expected an integer of at least 0, got -1"),
        ({"num_tasks": True}, "num_tasks"),
        ({"num_tasks": 8, "r": 7}, "r: expected at least 8, got 7"),
        ({"num_tasks": 3, "gate": "top"}, "gate: expected one of"),
        ({"num_tasks": 0, "mutual_information": True}, "mutual_information"),
        ({"num_tasks": 3, "alpha": float("nan")}, "alpha"),
        ({"num_tasks": 3, "task_alpha": -1.0}, "alpha"),
        ({"num_tasks": 3, "dropout": 1.0}, "dropout"),
        ({"num_tasks": 5000, "r": 5000}, "num_experts"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        CLoraeConfig(**fields)


def test_tasks_are_checked():
    layer, x = make(dtype=torch.float32), samples(torch.float32)
    with pytest.raises(TypeError, match="task_ids: expected integers"):
        c_lorae.set_tasks(layer, torch.zeros(5))
    with pytest.raises(ValueError, match=r"task_ids: expected \(B,\).*, got \(5, 1\)"):
        c_lorae.set_tasks(layer, torch.zeros(5, 1, dtype=torch.int))
    with pytest.raises(ValueError, match=r"c_lorae\.inject"):
        c_lorae.set_tasks(nn.Linear(2, 2), TASKS)
    c_lorae.set_tasks(layer, torch.zeros(3, dtype=torch.int))
    with pytest.raises(ValueError, match=r"task_ids: .* or 5, one per sample, .*, got 3"):
        layer(x)
    with pytest.raises(ValueError, match=r"task ids in \[-1, 3\), got 3"):
        c_lorae.set_tasks(layer, torch.full((5,), 3))
    c_lorae.set_tasks(layer, None)
    with pytest.raises(RuntimeError, match="task_ids: expected"):
        layer(x)


# --- in models -----------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
T5_LINEARS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
WORDS = torch.randint(3, 38, (6, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([0, 1, 0, 1, 0, 1])
OF_T5 = CLoraeConfig(num_tasks=2, r=8, alpha=8, mutual_information=True, target_modules=T5_LINEARS)


def t5(config=None, seed=0):
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    add_visual(model, ("encoder.block.0", "encoder.block.1"), 12, heads=2, head_width=8)
    return c_lorae.inject(model, config or OF_T5).eval()


def answers():
    """Four tokens and the end: of task 0 from the words, of task 1 from the picture."""
    seen = 3 + (IMAGES.sum((1, 2)) > 0).long()
    first = torch.where(IDS == 0, WORDS[:, 0], seen)
    return torch.stack([first, first, WORDS[:, 1], torch.ones_like(first)], 1)


def give(model, n=6):
    c_lorae.set_tasks(model, IDS[:n])
    set_images(model, IMAGES[:n])


def test_t5_trains_and_generates():
    model = t5()
    untouched = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert len(c_lorae.layers_of(model)) == 2 * (4 + 8) + 2 * (3 + 3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    give(model)
    trace = []
    for _ in range(150):
        loss = model(input_ids=WORDS, labels=answers()).loss
        trace.append(loss.item())
        (loss + 0.01 * c_lorae.mutual_information_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trace[-1] < 0.1 * trace[0]
    assert all(torch.equal(p, untouched[n]) for n, p in model.named_parameters() if n in untouched)
    said = model.generate(input_ids=WORDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(said[:, 1:], answers())
    beams = model.generate(input_ids=WORDS, max_new_tokens=4, do_sample=False, num_beams=3)
    assert torch.equal(beams[:, 1:5], answers())


def randomised(model):
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def logits(model):
    give(model)
    return model(input_ids=WORDS, decoder_input_ids=answers()).logits


def test_tasks_and_images_matter_sample_by_sample():
    model = randomised(t5())
    whole = logits(model)
    c_lorae.set_tasks(model, IDS[[1, 0, 2, 3, 4, 5]])
    moved = model(input_ids=WORDS, decoder_input_ids=answers()).logits
    changed = (moved - whole).flatten(1).abs().amax(1) > 1e-3
    assert changed.tolist() == [True, True, False, False, False, False]


@fp64
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_t5(reentrant):
    def gradients(checkpointed):
        model = randomised(t5()).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        give(model)
        model(input_ids=WORDS, labels=answers(), use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    plain = gradients(False)
    torch.manual_seed(0)
    for name, grad in gradients(True).items():
        assert relative_error(grad, plain[name]) < 1e-10, name


def test_decoder_generates_as_it_computes():
    """With a cache, token by token, the same as in one forward."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=24, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    add_visual(model, ("model.layers.1",), 12, heads=2, head_width=8)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    c_lorae.inject(model, CLoraeConfig(num_tasks=2, r=4, alpha=4, target_modules=linears))
    randomised(model)
    give(model)
    out = model.generate(input_ids=WORDS, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        whole = model(input_ids=out).logits.argmax(-1)
    assert torch.equal(out[:, 7:], whole[:, 6:-1])


# --- on disk -------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model = randomised(t5())
    path = c_lorae.save(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["c_lorae.safetensors"]
    other = c_lorae.load(t5(), tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_load_in_the_middle_of_training_continues_bit_for_bit(tmp_path):
    def train(model, optimizer, steps):
        give(model)
        for _ in range(steps):
            model(input_ids=WORDS, labels=answers()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        model = t5()
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.Adam(trained, lr=1e-2)

    whole, optimizer = fresh()
    train(whole, optimizer, 6)
    half, optimizer = fresh()
    train(half, optimizer, 3)
    c_lorae.save(half, tmp_path)
    resumed, other = fresh()
    c_lorae.load(resumed, tmp_path)
    other.load_state_dict(optimizer.state_dict())
    train(resumed, other, 3)
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "sigmoid"}, "the model has .*sigmoid.*, the file .*softmax"),
        ({"gate": "sum"}, "sum"),
        ({"r": 6}, "ranks"),
        ({"alpha": 9.0}, "scales"),
        ({"task_alpha": 2.0}, "scales"),
        ({"target_modules": ("q", "v")}, "the model has None"),
    ],
)
def test_another_models_file_is_refused_and_nothing_changes(tmp_path, change, message):
    c_lorae.save(randomised(t5()), tmp_path)
    other = t5(dataclasses.replace(OF_T5, **change))
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(ValueError, match=message):
        c_lorae.load(other, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_damaged_files_are_refused(tmp_path):
    model = randomised(t5())
    path = c_lorae.save(model, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="without gaps"):
        c_lorae.load(t5(), tmp_path)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    c_lorae.save(model, tmp_path)
    with pytest.raises(ValueError, match="finite"):
        c_lorae.load(t5(), tmp_path)
    other = lora_moe.inject(
        nn.Sequential(nn.Linear(4, 4)), lora_moe.LoraMoeConfig(target_modules=("0",))
    )
    lora_moe.save_adapter(other, tmp_path)
    (tmp_path / "lora_moe.safetensors").rename(path)
    with pytest.raises(ValueError, match="expected c_lorae in its metadata"):
        c_lorae.load(t5(), tmp_path)
    with pytest.raises(ValueError, match="experts or GatedVisual"):
        c_lorae.save(nn.Linear(2, 2), tmp_path)
