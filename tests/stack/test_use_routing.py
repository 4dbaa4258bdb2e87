"""Routing for a block of code and a thread: servers, beams, other batches."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers

import lora_moe
from lora_moe import disable_adapters, set_routing, use_routing
from lora_moe.context import thread

from ..support.models.llamas import TOKENS, first_layer, llama, with_experts
from ..support.models.tasks import answers, ids


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
        with use_routing(model, mask=torch.ones(2, 6)):  # inherits the routing of the outer block
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
