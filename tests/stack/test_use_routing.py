"""Routing for a block of code and a thread: servers, beams, checkpoints, compiled models."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

import lora_moe
from lora_moe import disable_adapters, injected, set_routing, use_routing
from lora_moe.context import thread

from ..support.models.llamas import TOKENS, first_layer, gradients, llama, with_experts


def ids(*values):
    return torch.tensor(values)


@torch.no_grad()
def answers(model, tokens=TOKENS):
    """The logits of each expert for all samples."""
    out = []
    for e in range(4):
        with use_routing(model, task_ids=ids(*[e] * len(tokens))):
            out.append(model(tokens).logits)
    return out


def in_thread(function):
    worker = threading.Thread(target=function)
    worker.start()
    worker.join()


def test_a_block_decides_and_its_end_gives_back():
    model = with_experts().eval()
    own, each = model(TOKENS).logits, answers(model)
    assert not any(torch.allclose(own, other) for other in each)
    with use_routing(model, task_ids=ids(2, 3)):
        mixed = model(TOKENS).logits
        assert first_layer(model).routing.indices[:, 0].tolist() == [2] * 6 + [3] * 6
    torch.testing.assert_close(mixed, torch.stack([each[2][0], each[3][1]]))
    assert torch.equal(model(TOKENS).logits, own)
    assert not thread.decisions and not thread.calls


def test_blocks_nest_and_go_over_set_routing():
    model = with_experts().eval()
    each = answers(model)
    set_routing(model, task_ids=ids(1, 1))
    with use_routing(model, task_ids=ids(2, 2)):
        with use_routing(model, mask=torch.ones(2, 6)):  # keeps the routing of the block around
            assert torch.equal(model(TOKENS).logits, each[2])
        with use_routing(model, task_ids=ids(0, 0)):
            assert torch.equal(model(TOKENS).logits, each[0])
    assert torch.equal(model(TOKENS).logits, each[1])


def test_a_block_that_raises_gives_back_too():
    model = with_experts().eval()
    with pytest.raises(ZeroDivisionError), use_routing(model, task_ids=ids(0, 0)):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="indices"), use_routing(model, task_ids=ids(0, 0)):
        model(TOKENS[0].float())
    assert not thread.decisions and not thread.calls


def test_four_threads_see_their_own_requests_only():
    model = with_experts().eval()
    each, wrong = answers(model), []

    @torch.no_grad()
    def serve(e):
        for _ in range(25):
            with use_routing(model, task_ids=ids(e, e)):
                same = torch.equal(model(TOKENS).logits, each[e])
                mine = first_layer(model).routing.indices.eq(e).all()
            if not (same and mine):
                wrong.append(e)

    threads = [threading.Thread(target=serve, args=(e,)) for e in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert (first_layer(model).routing.indices == 3).all()  # this thread's own last forward


def test_disabled_adapters_are_the_base_bit_for_bit():
    model, base = with_experts().train(), llama().train()
    with use_routing(model, task_ids=ids(0, 1)), disable_adapters(model):
        y = model(TOKENS).logits
    assert torch.equal(y, base(TOKENS).logits)
    assert not y.requires_grad
    assert not torch.allclose(model(TOKENS).logits, y)


def test_disabling_what_trained_in_place_is_refused():
    config = lora_moe.LoraMoeConfig(r=2, target_modules=("q_proj",), modules_to_save=("norm",))
    model = with_experts(config=config)
    with pytest.raises(ValueError, match=r"norm .*trains in place"), disable_adapters(model):
        pass


# --- rows and samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_another_batch_at_the_top_is_refused(rows):
    model = with_experts().eval()
    with (
        use_routing(model, task_ids=ids(*[0] * rows)),
        pytest.raises(ValueError, match=rf"task_ids: expected 2, .*\(2, 6\), got {rows}"),
    ):
        model(TOKENS)
    assert not thread.calls


def test_one_id_per_token():
    model = with_experts().eval()
    each = answers(model)
    with use_routing(model, task_ids=ids(*[0] * 6, *[3] * 6)):
        torch.testing.assert_close(model(TOKENS).logits, torch.stack([each[0][0], each[3][1]]))


@pytest.mark.parametrize("beams, returned", [(3, 3), (4, 2), (1, 1)])
def test_beams_and_return_sequences(beams, returned):
    model = with_experts().eval()
    options = {"num_beams": beams, "num_return_sequences": returned, "max_new_tokens": 4}
    options |= {"do_sample": False, "pad_token_id": 0}
    with use_routing(model, task_ids=ids(0, 3)):
        both = model.generate(TOKENS, **options)
    for i, e in enumerate((0, 3)):
        with use_routing(model, task_ids=ids(e)):
            alone = model.generate(TOKENS[i : i + 1], **options)
        assert torch.equal(both[i * returned : (i + 1) * returned], alone)


def test_samples_that_stand_several_times_in_a_row():
    model = with_experts().eval()
    with use_routing(model, task_ids=ids(0, 3)):
        several = model.generate(
            TOKENS, num_return_sequences=3, do_sample=True, max_new_tokens=2, pad_token_id=0
        )
    assert several.shape == (6, 8)
    assert first_layer(model).routing.indices.flatten().tolist() == [0] * 3 + [3] * 3


def test_generate_refuses_another_batch_too():
    model = with_experts().eval()
    with (
        use_routing(model, task_ids=ids(0, 3)),
        pytest.raises(ValueError, match=r"expected 4, one per sample .* got 2"),
    ):
        model.generate(TOKENS.repeat(2, 1), max_new_tokens=2, pad_token_id=0)


def test_a_batch_is_checked_after_a_keyboard_interrupt_too():
    model = with_experts().eval()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(TOKENS)
    hook.remove()
    with use_routing(model, task_ids=ids(0)), pytest.raises(ValueError, match="expected 2"):
        model(TOKENS)
    assert lora_moe.context.thread.calls == []


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=None, dropout_rate=0.0,
    )  # fmt: skip
    return with_experts(transformers.T5ForConditionalGeneration(config)).eval()


def test_encoder_and_decoder_of_other_row_counts():
    model, options = t5(), {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4}
    with use_routing(model, task_ids=ids(0, 3)):
        both = model.generate(TOKENS, do_sample=False, **options)
    for i, e in enumerate((0, 3)):
        with use_routing(model, task_ids=ids(e)):
            alone = model.generate(TOKENS[i : i + 1], do_sample=False, **options)
        assert torch.equal(both[3 * i : 3 * i + 3], alone)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "expected task_ids, mask or routing"),
        ({"task_ids": ids(0, 4)}, ValueError, r"in \[-1, 4\), got 4"),
        ({"task_ids": torch.tensor([0.0])}, TypeError, "expected integers, got torch.float32"),
        ({"mask": torch.ones(1, 2, 3)}, ValueError, r"mask: expected \(B, L\) or \(T,\)"),
        ({"mask": [1, 1]}, ValueError, "mask: expected .* got list"),
        ({"routing": 3}, ValueError, "expected a Routing, got int"),
        ({"routing": {"nowhere": None}}, ValueError, "paths of injected modules"),
    ],
    ids=["nothing", "no-expert", "floats", "cube", "list", "number", "path"],
)
def test_wrong_arguments_are_named(arguments, error, message):
    model = with_experts()
    with pytest.raises(error, match=message), use_routing(model, **arguments):
        pass


def test_a_list_of_ids_will_do():
    model = with_experts().eval()
    with use_routing(model, task_ids=[2, 2]):
        assert torch.equal(model(TOKENS).logits, answers(model)[2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_ids_of_any_integer_dtype(dtype):
    model = with_experts().eval()
    with use_routing(model, task_ids=torch.tensor([2, 2], dtype=dtype)):
        assert torch.equal(model(TOKENS).logits, answers(model)[2])


# --- checkpoints -----------------------------------------------------------------------------------


def two_tasks(model, decide):
    """The gradients of two forwards with tasks of their own, whose backward comes afterwards."""
    losses = []
    for tasks in (ids(0, 1), ids(2, 3)):
        with decide(model, tasks):
            losses.append(model(TOKENS, labels=TOKENS).loss)
    return sum(losses)


def block(model, tasks):
    return use_routing(model, task_ids=tasks)


class Set:
    """set_routing, whose effect lasts."""

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
    monkeypatch.setattr(lora_moe.context, "_reentrant_around", list)
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
    monkeypatch.setattr(lora_moe.context, "_checkpoints_around", list)
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
    """context._checkpoints_around reads a private closure: notice when PyTorch changes it."""
    seen = []

    def function(x):
        seen.extend(lora_moe.context._checkpoints_around())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2 and seen[0] is seen[1] is not None
    assert lora_moe.context._checkpoints_around() == []


# --- copies and compilers ----------------------------------------------------------------------------


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
    assert [layer.given for layer in injected(model).values()] == [None] * 14
    torch._dynamo.reset()
