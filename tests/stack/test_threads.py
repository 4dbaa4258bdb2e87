"""Each forward has its own routing, per thread, and when a checkpoint recomputes it in another thread."""

import asyncio
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from lora_moe import injected, use_routing

from .processes import tiny

TASKS = [torch.tensor([0, 2]), torch.tensor([1, -1])]
KINDS = ["reentrant", "non-reentrant"]


def in_a_thread(function):
    """Runs the function in a new thread; returns its result or raises its exception."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def gradients(adapted, losses, backward):
    adapted.zero_grad()
    backward(sum(losses))
    return {n: p.grad.clone() for n, p in tiny.trained(adapted).items() if p.grad is not None}


def two_forwards(adapted):
    """Losses of two forwards with different tasks and of one that the routers decide."""
    losses = []
    for tasks in TASKS:
        with use_routing(adapted, task_ids=tasks):
            losses.append(adapted(**tiny.batch(0)).loss)
    return [*losses, adapted(**tiny.batch(1)).loss]


def checkpointed(adapted, kind):
    adapted.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    adapted.enable_input_require_grads()
    return adapted


@pytest.mark.parametrize("where", ["after the blocks", "inside another block", "another thread"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recompute_sees_what_its_forward_was_told(kind, where):
    """Two forwards with different tasks, then backward: gradients as without checkpointing."""
    plain, adapted = tiny.model(), checkpointed(tiny.model(), kind)
    expected = gradients(plain, two_forwards(plain), lambda loss: loss.backward())
    losses = two_forwards(adapted)

    def backward(loss):
        if where == "another thread":
            return in_a_thread(loss.backward)
        if where == "inside another block":
            with use_routing(adapted, task_ids=torch.tensor([2, 2])):
                return loss.backward()
        return loss.backward()

    tiny.expect_equal(gradients(adapted, losses, backward), expected, "gradients", 1e-6)


@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize("outer", KINDS)
def test_nested_checkpoints(outer, inner):
    """The inner checkpoint is created again each time the outer one is recomputed."""
    adapted = tiny.model()
    layer, x = adapted.model.layers[0].mlp.down_proj, torch.randn(2, 5, 24, requires_grad=True)

    def inside(x):
        return checkpoint(layer, x, use_reentrant=inner == "reentrant").sin()

    def run(function):
        adapted.zero_grad()
        for tasks in TASKS:
            with use_routing(adapted, task_ids=tasks):
                y = function(x)
            y.square().sum().backward()
        return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

    expected = run(lambda x: layer(x).sin())
    ours = run(lambda x: checkpoint(inside, x, use_reentrant=outer == "reentrant"))
    tiny.expect_equal(ours, expected, "gradients", 1e-6)


def test_a_forward_without_gradients_leaves_no_trace():
    """It belongs to no checkpoint, so nothing is stored for it."""
    from lora_moe import context

    adapted = tiny.model()
    with torch.no_grad(), use_routing(adapted, task_ids=TASKS[0]):
        adapted(**tiny.batch(0))
    layers = set(injected(adapted).values())
    assert not any(layers & kept.keys() for kept in context._checkpoints.values())


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_threads_have_tasks_of_their_own(how):
    """Four threads with a hundred requests each on one model: none gets the answer of another."""
    adapted = tiny.model().eval()
    batch = {k: v for k, v in tiny.batch(0).items() if k != "labels"}
    run = adapted if how == "eager" else torch.compile(adapted, backend="eager", dynamic=False)

    def answer(task):
        with torch.no_grad(), use_routing(adapted, task_ids=torch.tensor([task, task])):
            return run(**batch).logits

    tasks = [0, 1, 2, -1]
    expected = {task: answer(task) for task in tasks}
    assert len({float(logits.sum()) for logits in expected.values()}) == 4
    wrong, start = [], threading.Barrier(4)

    def serve(task):
        start.wait()
        wrong.extend(task for _ in range(100) if not torch.equal(answer(task), expected[task]))

    threads = [threading.Thread(target=serve, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of 400 wrong"


def test_asyncio_tasks_of_one_thread_do_not_meet_in_silence():
    adapted, answers = tiny.model(), []

    async def request(tasks):
        with use_routing(adapted, task_ids=tasks):
            await asyncio.sleep(0)
            answers.append(adapted(**tiny.batch(0)).logits)

    async def serve():
        return await asyncio.gather(*map(request, TASKS), return_exceptions=True)

    first, second = asyncio.run(serve())
    assert first is None and "do not await" in str(second)
    with use_routing(adapted, task_ids=TASKS[0]):
        assert torch.equal(answers[0], adapted(**tiny.batch(0)).logits)


def test_asyncio_tasks_that_do_not_meet_are_served():
    adapted = tiny.model()

    async def request(tasks):
        await asyncio.sleep(0)
        with use_routing(adapted, task_ids=tasks):
            return adapted(**tiny.batch(0)).logits

    async def serve():
        with use_routing(adapted, task_ids=TASKS[1]):
            inside = await request(TASKS[0])
        return inside, *await asyncio.gather(*map(request, TASKS))

    inside, *answers = asyncio.run(serve())
    assert torch.equal(inside, answers[0])
    for tasks, answer in zip(TASKS, answers, strict=True):
        with use_routing(adapted, task_ids=tasks):
            assert torch.equal(answer, adapted(**tiny.batch(0)).logits)


@pytest.mark.parametrize("where", ["one thread", "another thread"])
def test_a_generator_does_not_leave_its_tasks_behind_in_silence(where):
    adapted = tiny.model()
    plain = adapted(**tiny.batch(0)).logits

    def stream(tasks):
        with use_routing(adapted, task_ids=tasks):
            yield adapted(**tiny.batch(0)).logits

    streams = [stream(tasks) for tasks in TASKS]
    for each in streams:
        next(each)
    for each in streams:
        with pytest.raises(RuntimeError, match="do not await or yield"):
            in_a_thread(each.__next__) if where == "another thread" else next(each)
    assert torch.equal(adapted(**tiny.batch(0)).logits, plain)
