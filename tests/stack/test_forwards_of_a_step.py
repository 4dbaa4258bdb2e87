"""Every forward of a training step counts, and evaluation changes nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

from lora_moe import (
    LoraMoeConfig,
    aux_loss,
    injected,
    router_stats,
    set_routing,
)
from lora_moe.forward_records import record_of

from ..support.models.llamas import TOKENS, first_layer, gradients, with_experts


def test_every_forward_of_a_step_counts_by_its_tokens():
    model = with_experts().train()
    parts = TOKENS[:, :2], TOKENS[:, 2:]
    each = []
    for part in parts:
        model(part)
        each.append(aux_loss(model))
        each[-1].backward()
    for part in parts:
        model(part)
    both = aux_loss(model)
    torch.testing.assert_close(both, (4 * each[0] + 8 * each[1]) / 12)
    assert torch.equal(aux_loss(model), both)  # reading twice is harmless
    both.backward()
    model(parts[0])
    torch.testing.assert_close(aux_loss(model), each[0])


def test_a_forward_without_gradients_erases_nothing():
    model = with_experts().train()
    model(TOKENS)
    with torch.no_grad():
        model(TOKENS.flip(1))
        model.eval()(TOKENS.flip(1))
    loss = aux_loss(model.train())
    model(TOKENS)
    torch.testing.assert_close(loss, aux_loss(model))
    loss.backward()
    assert first_layer(model).router_weight.grad.any()


def test_a_backward_settles_a_forward_that_nobody_read():
    model = with_experts().train()
    model(TOKENS.flip(1), labels=TOKENS).loss.backward()
    model(TOKENS)
    got = aux_loss(model)
    assert len(record_of(first_layer(model)).pending) == 1
    fresh = with_experts().train()
    fresh(TOKENS)
    torch.testing.assert_close(got, aux_loss(fresh))


@pytest.mark.parametrize("order", ["evaluation-first", "training-first"])
def test_an_evaluation_that_forgot_no_grad_has_no_part_in_the_loss(order):
    model, fresh = with_experts(), with_experts().train()

    def evaluate():
        model.eval()
        for _ in range(3):
            model(TOKENS.flip(1)[:, :3])
        model.train()

    if order == "evaluation-first":
        evaluate()
    model.train()(TOKENS)
    if order == "training-first":
        evaluate()
    fresh(TOKENS)
    assert torch.equal(aux_loss(model), aux_loss(fresh))


def test_a_model_that_trains_in_evaluation_mode_has_a_loss():
    model = with_experts().eval()
    model(TOKENS)
    aux_loss(model).backward()
    assert first_layer(model).router_weight.grad.any()


def test_reading_the_loss_to_log_it_settles_nothing():
    model, fresh = with_experts().train(), with_experts().train()
    model(TOKENS)
    with torch.no_grad():
        aux_loss(model)
    model(TOKENS.flip(1)[:, :3])
    fresh(TOKENS)
    fresh(TOKENS.flip(1)[:, :3])
    assert torch.equal(aux_loss(model), aux_loss(fresh))


def test_nothing_is_kept_without_coefficients():
    config = LoraMoeConfig(
        num_experts=4, r=2, target_modules="all-linear", balance_coef=0, z_coef=0
    )
    model = with_experts(config=config).train()
    for _ in range(20):
        model(TOKENS)
    assert not record_of(first_layer(model)).pending
    assert aux_loss(model) == 0


def test_at_most_sixteen_forwards_wait():
    model = with_experts().train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(20):
            model(TOKENS)
    assert len(told) == 1 and "torch.no_grad()" in str(told[0].message)
    assert len(record_of(first_layer(model)).pending) == 16


def test_statistics_of_training_and_evaluation_are_apart():
    model = with_experts().train()
    model(TOKENS)
    name = next(iter(injected(model)))
    trained = router_stats(model)[name]["load"]
    with torch.no_grad():
        model.eval()(TOKENS[:, :1].expand(2, 6))
    evaluated = router_stats(model, training=False)[name]["load"]
    assert torch.equal(router_stats(model, training=True)[name]["load"], trained)
    assert torch.equal(router_stats(model)[name]["load"], evaluated)
    assert not torch.equal(trained, evaluated)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        fresh = with_experts().train()
        fresh(TOKENS)
        router_stats(fresh, training=False)


def test_a_compiled_model_pays_for_its_last_forward():
    model = with_experts().train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(TOKENS, labels=TOKENS).loss + aux_loss(model)
    loss.backward()
    got = gradients(model)
    with torch.no_grad():
        compiled(TOKENS)
    plain = with_experts().train()
    (plain(TOKENS, labels=TOKENS).loss + aux_loss(plain)).backward()
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_routing_by_the_caller_leaves_nothing_to_balance_and_says_so():
    model = with_experts().train()
    set_routing(model, task_ids=torch.tensor([0, 1]))
    model(TOKENS)
    with pytest.warns(UserWarning, match="aux_loss is 0"):
        assert aux_loss(model) == 0
