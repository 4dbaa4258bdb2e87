"""Every preset in a tiny Llama: a training step, a file read by another process, decoding with a cache."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from lora_moe import Routing, inject, injected, load_adapter, presets, save_adapter, use_routing

from ...support.models import tiny
from .formulas import CASES
from .mixtures import Case

CASES = CASES | {
    "xlora": Case(lambda **f: presets.xlora(16, 4, 2, alpha=8, **f), None),
    "mola_by_layer": Case(lambda **f: presets.mola((2, 3), (2, 4), **f), None),
}
TARGETS = ("q_proj", "down_proj")
IDS, TASKS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([2, 0])
SLOTS = ("smola", "smola_modal")
SEQUENCE = [name for name in CASES if CASES[name].sequence and name not in SLOTS]


def model(name, trained=True):
    made = inject(tiny.base(0), CASES[name].make(target_modules=TARGETS))
    if trained:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in injected(made).values():
                for tensor in layer.adapter_state().values():
                    nn.init.normal_(tensor, std=0.3, generator=g)
    return ready(made, name)


def ready(made, name):
    if name == "xlora":
        presets.two_passes(made)
    return made


def told(made, name):
    tasks = CASES[name].tasks
    return use_routing(made, task_ids=TASKS) if tasks else contextlib.nullcontext()


@pytest.mark.parametrize("name", CASES)
def test_a_step_lowers_the_loss(name):
    made = model(name, trained=False).train()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.where(mask != 0, -100)}
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.01), []
    for _ in range(2):
        torch.manual_seed(0)  # the same noise in each step
        with told(made, name):
            losses.append(made(**batch).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0] - 1e-4


def logits_of(directory):
    """Runs in another process: saves the logits of each folder's model."""
    found = {}
    for name in CASES:
        made = ready(load_adapter(tiny.base(0), f"{directory}/{name}"), name).eval()
        with torch.no_grad(), told(made, name):
            found[name] = made(IDS).logits
    torch.save(found, f"{directory}/logits.pt")


def test_files_give_the_same_bits_in_another_process(tmp_path):
    want = {}
    for name in CASES:
        made = model(name).eval()
        save_adapter(made, tmp_path / name)
        with torch.no_grad(), told(made, name):
            want[name] = made(IDS).logits
    code = (
        f"from tests.methods.presets import test_models; test_models.logits_of({str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    got = torch.load(tmp_path / "logits.pt")
    assert not [name for name in CASES if not torch.equal(want[name], got[name])]
    with torch.no_grad():
        bare = tiny.base(0).eval()(IDS).logits
    assert not [name for name in CASES if torch.equal(want[name], bare)]


def generated(made, **options):
    out = made.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits, 1)  # (B, 4, V)


def assert_as_in_one_forward(made, name):
    """The logits of each step equal those of a forward over all tokens so far."""
    sequences, steps = generated(made, use_cache=name != "xlora")
    with torch.no_grad():
        whole = made(sequences[:, :-1], use_cache=False).logits[:, IDS.shape[1] - 1 :]
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if not CASES[n].sequence])
def test_generate_with_a_cache_equals_the_full_forward(name):
    """xlora recomputes everything and takes no cache."""
    made = model(name).eval()
    with told(made, name):
        assert_as_in_one_forward(made, name)


@pytest.mark.parametrize("name", SEQUENCE)
def test_generate_keeps_the_prompts_decision(name):
    made = model(name).eval()
    with torch.no_grad(), told(made, name):
        made(IDS)
        kept = {path: layer.routing for path, layer in injected(made).items()}
        sequences, steps = generated(made)
    rows = {
        path: Routing.from_ids(r.indices[::4], r.weights[::4], num_experts=r.num_experts)
        for path, r in kept.items()
    }
    with torch.no_grad(), use_routing(made, routing=rows):
        whole = made(sequences[:, :-1], use_cache=False).logits[:, 3:]
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SLOTS)
def test_slots_are_not_causal_and_refuse_a_cache(name):
    made = model(name).eval()
    other = IDS.clone()
    other[:, 1] = 20
    with torch.no_grad(), told(made, name):
        assert (made(IDS).logits[:, 0] - made(other).logits[:, 0]).abs().max() > 1e-4
        with pytest.raises(RuntimeError, match="use_cache=False"):
            made.generate(IDS, max_new_tokens=2, pad_token_id=0)


def test_xlora_requires_its_first_pass_and_no_cache():
    made = inject(tiny.base(0), CASES["xlora"].make(target_modules=TARGETS))
    with pytest.raises(RuntimeError, match="two_passes"):
        made(IDS)
    handle = presets.two_passes(made)
    with pytest.raises(RuntimeError, match="use_cache=False"):
        made.generate(IDS, max_new_tokens=2, pad_token_id=0)
    handle.remove()
    with pytest.raises(ValueError, match="HiddenRouter"):
        presets.two_passes(inject(tiny.base(0), presets.moelora(target_modules=TARGETS)))


@pytest.mark.parametrize("name", ["xlora", "smola", "noisy", "conditional_mixlora", "more"])
def test_checkpoints_recompute_the_same(name):
    grads = []
    for checkpointed in (False, True):
        made = model(name).train()
        if checkpointed:
            made.enable_input_require_grads()
            made.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with told(made, name):
            loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        grads.append({n: p.grad for n, p in made.named_parameters() if p.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-7)
