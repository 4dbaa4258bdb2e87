"""use_routing in recomputations, copies and compiled models."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_moe
from lora_moe import disable_adapters, injected, set_routing, use_routing

from ..support.models.llamas import TOKENS, first_layer, gradients, llama, with_experts
from ..support.models.tasks import answers, ids


def in_thread(function):
    worker = threading.Thread(target=function)
    worker.start()
    worker.join()


def two_tasks(model, decide):
    """The summed loss of two forwards with different tasks, for a backward after both."""
    losses = []
    for tasks in (ids(0, 1), ids(2, 3)):
        with decide(model, tasks):
            losses.append(model(TOKENS, labels=TOKENS).loss)
    return sum(losses)


def block(model, tasks):
    return use_routing(model, task_ids=tasks)


class Set:
    """set_routing as a context manager; its effect lasts."""

    def __init__(self, model, tasks):
        set_routing(model, task_ids=tasks)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("decide", [block, Set], ids=["use_routing", "set_routing"])
@pytest.mark.parametrize("where", ["here", "thread", "other-block"])
def test_a_recompute_sees_what_its_own_forward_saw(decide, where):
    model = with_experts().train()
    two_tasks(model, decide).backward()
    want = gradients(model)
    model.zero_grad()
    set_routing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = two_tasks(model, decide)
    if where == "thread":
        in_thread(loss.backward)
    elif where == "here":
        loss.backward()
    else:
        with use_routing(model, task_ids=ids(3, 3)):
            loss.backward()
    got = gradients(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_forward_outside_of_any_block_recomputes_outside():
    model = with_experts().train()
    model(TOKENS, labels=TOKENS).loss.backward()
    want = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(TOKENS, labels=TOKENS).loss
    with use_routing(model, task_ids=ids(3, 3)):
        loss.backward()
    got = gradients(model)
    assert all(torch.equal(got[name], want[name]) for name in want)


def reentrant(layer, x, tasks):
    with use_routing(layer, task_ids=tasks):
        return checkpoint(layer, x, use_reentrant=True)


def test_a_recompute_that_cannot_know_uses_the_open_block_or_raises(monkeypatch):
    monkeypatch.setattr(lora_moe.context, "reentrant_around", list)
    layer = first_layer(with_experts()).train()
    x = torch.randn(2, 3, 16, requires_grad=True)
    with use_routing(layer, task_ids=ids(1, 2)):
        checkpoint(layer, x, use_reentrant=True).sum().backward()
        got, layer.lora_B.grad = layer.lora_B.grad, None
        layer(x).sum().backward()
    assert torch.equal(got, layer.lora_B.grad)

    y = reentrant(layer, x, ids(1, 2))
    opened, closed = threading.Event(), threading.Event()

    def elsewhere():
        with use_routing(layer, task_ids=ids(0, 0)):
            opened.set()
            closed.wait()

    worker = threading.Thread(target=elsewhere)
    worker.start()
    opened.wait()
    try:
        with (
            use_routing(layer, task_ids=ids(3, 3)),
            pytest.raises(RuntimeError, match="use_reentrant=False"),
        ):
            y.sum().backward()
    finally:
        closed.set()
        worker.join()


def test_checkpoint_context_for_a_pytorch_that_hides_its_checkpoints(monkeypatch):
    monkeypatch.setattr(lora_moe.context, "checkpoints_around", list)
    layer = first_layer(with_experts()).train()
    x = torch.randn(2, 3, 16, requires_grad=True)

    def run(tasks, checkpointed):
        with use_routing(layer, task_ids=tasks):
            if not checkpointed:
                return layer(x)
            return checkpoint(layer, x, use_reentrant=False, context_fn=lora_moe.checkpoint_context)

    (run(ids(0, 1), False) + 2 * run(ids(2, 3), False)).sum().backward()
    want, layer.lora_B.grad = layer.lora_B.grad, None
    (run(ids(0, 1), True) + 2 * run(ids(2, 3), True)).sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, want)


def test_this_pytorch_shows_its_checkpoints():
    """recompute.checkpoints_around reads a private closure; fails if PyTorch changes it."""
    seen = []

    def function(x):
        seen.extend(lora_moe.recompute.checkpoints_around())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2 and seen[0] is seen[1] is not None
    assert lora_moe.recompute.checkpoints_around() == []


def test_copies_and_pickles_have_contexts_of_their_own():
    model = with_experts().eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with use_routing(model, task_ids=ids(1, 1)):
            own = twin(TOKENS).logits
        assert torch.equal(own, twin(TOKENS).logits)
        with use_routing(twin, task_ids=ids(1, 1)):
            assert torch.equal(twin(TOKENS).logits, answers(model)[1])
        assert twin.generate.model is twin and twin.save_pretrained.model is twin


def test_a_compiled_model_sees_new_ids_without_compiling_anew():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = with_experts().eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    each = answers(model)

    @torch.no_grad()
    def serve():
        for e in (0, 2, 3):
            with use_routing(model, task_ids=ids(e, 3)):
                want = torch.stack([each[e][0], each[3][1]])
                torch.testing.assert_close(compiled(TOKENS).logits, want)

    serve()
    assert counter.frame_count == 1
    in_thread(serve)
    assert counter.frame_count == 1
    with torch.no_grad(), disable_adapters(model):
        torch.testing.assert_close(compiled(TOKENS).logits, llama().eval()(TOKENS).logits)
    assert [layer.routing_override for layer in injected(model).values()] == [None] * 14
    torch._dynamo.reset()
