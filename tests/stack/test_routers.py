"""Custom routers in a tiny Llama: checkpoints, threads, beams, caches, files, compile."""

import threading

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from lora_moe import (
    LoraMoeConfig,
    aux_loss,
    inject,
    injected,
    load_adapter,
    save_adapter,
    set_routing,
    use_routing,
)
from lora_moe.routers import PerTaskRouter, SequenceRouter, TaskRouter, UniversalRouter

from ..support.models import tiny

SEQUENCE = ("first", "mean", "per-task")  # decide once per sequence
ROUTERS = {
    "task": {"router": TaskRouter(3)},
    "expert": {"router": TaskRouter(3, "expert"), "top_k": 1},
    "universal": {"router": UniversalRouter(3)},
    "token-per-task": {"router": PerTaskRouter(3)},
    "first": {"router": SequenceRouter("first")},
    "mean": {"router": SequenceRouter("mean"), "top_k": 2},
    "per-task": {"router": SequenceRouter("mean", PerTaskRouter(3))},
}
PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
IDS = torch.tensor([2, 0])


def model(name, seed=0):
    made = inject(tiny.base(seed), LoraMoeConfig(**tiny.EXPERTS | ROUTERS[name]))
    g = torch.Generator().manual_seed(1)
    for layer in injected(made).values():
        for parameter in layer.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.3, generator=g)
    return made


def told(made, ids=IDS):
    tasks = next(iter(injected(made).values())).config.num_tasks
    return use_routing(made, task_ids=ids) if tasks else use_routing(made, mask=torch.ones(2, 4))


def batch():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    return {
        "input_ids": PROMPTS,
        "attention_mask": mask,
        "labels": PROMPTS.where(PROMPTS > 6, -100),
    }


def gradients(made, reentrant=None):
    made.train().zero_grad()
    if reentrant is not None:
        made.enable_input_require_grads()
        made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tasks = next(iter(injected(made).values())).config.num_tasks
    if tasks:
        set_routing(made, task_ids=IDS)
    loss = made(**batch()).loss
    if reentrant is None:
        loss = loss + 0 * aux_loss(made)
    if tasks:
        set_routing(made, task_ids=IDS.flip(0))  # does not affect the previous forward
    loss.backward()
    return {n: p.grad for n, p in made.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_checkpoints_recompute_decides_as_its_forward(name, reentrant):
    want, got = gradients(model(name)), gradients(model(name), reentrant)
    assert want.keys() == got.keys()
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ROUTERS)
def test_two_threads_have_their_own_tasks(name):
    made, found, ready = model(name).eval(), {}, threading.Barrier(2)

    def serve(ids):
        with torch.no_grad(), told(made, ids):
            ready.wait()
            found[tuple(ids.tolist())] = made(PROMPTS).logits

    threads = [threading.Thread(target=serve, args=(ids,)) for ids in (IDS, IDS.flip(0))]
    [t.start() for t in threads], [t.join() for t in threads]
    for ids in (IDS, IDS.flip(0)):
        with torch.no_grad(), told(made, ids):
            assert torch.equal(found[tuple(ids.tolist())], made(PROMPTS).logits)


@pytest.mark.parametrize("name", ROUTERS)
def test_beams_keep_their_samples_task(name):
    """Both samples in one call give the same results as each alone."""
    made, options = model(name).eval(), {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with told_for(made, IDS):
        together = made.generate(PROMPTS, attention_mask=mask, **options)
    for b in range(2):
        with told_for(made, IDS[b : b + 1]):
            alone = made.generate(PROMPTS[b : b + 1, (4 - int(mask[b].sum())) :], **options)
        n = min(alone.shape[1] - int(mask[b].sum()), together.shape[1] - 4)
        assert torch.equal(together[b, 4 : 4 + n], alone[0, int(mask[b].sum()) :][:n])


def told_for(made, ids):
    import contextlib

    tasks = next(iter(injected(made).values())).config.num_tasks
    return use_routing(made, task_ids=ids) if tasks else contextlib.nullcontext()


@pytest.mark.parametrize("name", [n for n in ROUTERS if n not in SEQUENCE])
def test_a_cache_changes_nothing(name):
    made = model(name).eval()
    with torch.no_grad(), told_for(made, IDS):
        out = made(PROMPTS[:, :3], use_cache=True)
        step = made(PROMPTS[:, 3:], past_key_values=out.past_key_values).logits
        whole = made(PROMPTS).logits
    torch.testing.assert_close(step[:, 0], whole[:, 3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SEQUENCE)
def test_the_prompts_decision_stays_while_a_cache_decodes(name):
    made = model(name).eval()
    with torch.no_grad(), told_for(made, IDS):
        first = made(PROMPTS, use_cache=True)
        decided = {n: layer.routing.indices[::4] for n, layer in injected(made).items()}
        other = made(PROMPTS.flip(0) + 7, use_cache=True)  # another request in between
        made(PROMPTS[:, :1], past_key_values=other.past_key_values)
        assert any((m.routing.indices != decided[n]).any() for n, m in injected(made).items())
        made.generate(PROMPTS, max_new_tokens=3, do_sample=False)
        made(PROMPTS[:, :1], past_key_values=first.past_key_values)
    for name_, layer in injected(made).items():
        assert torch.equal(layer.routing.indices, decided[name_])


@pytest.mark.parametrize("name", ["mean"])
def test_a_cache_of_other_prompts_is_refused(name):
    made = model(name).eval()
    with torch.no_grad():
        cache = made(PROMPTS, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match="past_key_values: expected the cache of the last 2"):
            made(PROMPTS[:1, :1], past_key_values=cache)


@pytest.mark.parametrize("name", ROUTERS)
def test_saved_and_loaded_bits(name, tmp_path):
    made = model(name).eval()
    save_adapter(made, tmp_path)
    again = load_adapter(tiny.base(0), tmp_path).eval()
    with torch.no_grad(), told_for(made, IDS), told_for(again, IDS):
        assert torch.equal(made(PROMPTS).logits, again(PROMPTS).logits)
    other = inject(tiny.base(0), LoraMoeConfig(**tiny.EXPERTS, selection_bias=True))
    with pytest.raises(ValueError, match="router"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("name", ["first", "mean"])
def test_padding_and_answers_do_not_decide(name):
    made = model(name).eval()
    row = PROMPTS[:1]
    with torch.no_grad():
        made(row)
        want = [layer.routing.indices[0] for layer in injected(made).values()]
        padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), row], 1)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        made(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        assert all(
            torch.equal(m.routing.indices[0], w) for m, w in zip(injected(made).values(), want)
        )
        answered = torch.cat([row, row + 9], 1)
        labels = answered.clone()
        labels[:, :4] = -100
        made(answered, labels=labels)
        assert all(
            torch.equal(m.routing.indices[0], w) for m, w in zip(injected(made).values(), want)
        )


@pytest.mark.parametrize("name", ["task", "universal", "mean"])
def test_compile_has_no_graph_break(name):
    made = model(name).eval()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), told_for(made, IDS):
        torch.testing.assert_close(compiled(PROMPTS, use_cache=False).logits, made(PROMPTS).logits)
    torch._dynamo.reset()
