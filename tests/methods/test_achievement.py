"""The achievement loss against examples computed by hand."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from lora_moe.methods.c_lorae.achievement import AchievementLoss

POTENTIALS = {"a": 0.8, "b": 0.5}  # targets: 0.84 and 0.525
LOSSES = {"a": torch.tensor(2.0), "b": torch.tensor(0.5)}


def values(tensor):
    return pytest.approx(tensor.tolist(), rel=1e-5)


def test_moving_average_starts_at_the_first_metric():
    loss = AchievementLoss(POTENTIALS)
    loss.update({"a": 0.42, "b": 0.105})
    assert values(loss.achieved) == [0.42, 0.105]
    loss.update({"b": 0.525, "a": 0.84})
    assert values(loss.achieved) == [0.1 * 0.84 + 0.9 * 0.42, 0.1 * 0.525 + 0.9 * 0.105]


def test_weights_by_hand():
    """1 - 0.42 / 0.84 = 1/2 and 1 - 0.105 / 0.525 = 4/5: w = (0.25, 0.64) before normalization."""
    loss = AchievementLoss(POTENTIALS, normalization="sum")
    loss.update({"a": 0.42, "b": 0.105})
    assert values(loss.raw_weights()) == [0.25, 0.64]
    assert values(loss.weights()) == [0.25 / 0.89, 0.64 / 0.89]
    softmax = AchievementLoss(POTENTIALS)
    softmax.update({"a": 0.42, "b": 0.105})
    e = math.exp(0.25), math.exp(0.64)
    assert values(softmax.weights()) == [e[0] / sum(e), e[1] / sum(e)]


def test_gamma_and_margin():
    loss = AchievementLoss(POTENTIALS, gamma=3, margin=0.25)  # targets: 1 and 0.625
    loss.update({"a": 0.5, "b": 0.5})
    assert values(loss.raw_weights()) == [0.125, 0.2**3]


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("geometric", 2.0 ** (0.25 / 0.89) * 0.5 ** (0.64 / 0.89)),
        ("sum", 2.0 * 0.25 / 0.89 + 0.5 * 0.64 / 0.89),
    ],
)
def test_both_forms_and_their_gradients(form, want):
    loss = AchievementLoss(POTENTIALS, form=form, normalization="sum")
    loss.update({"a": 0.42, "b": 0.105})
    leaves = {task: value.clone().requires_grad_() for task, value in LOSSES.items()}
    total = loss(leaves)
    assert total.item() == pytest.approx(want, rel=1e-5)
    total.backward()
    w, v = (0.25 / 0.89, 0.64 / 0.89), (2.0, 0.5)
    grads = [w[i] * (want / v[i] if form == "geometric" else 1) for i in (0, 1)]
    assert [leaf.grad.item() for leaf in leaves.values()] == pytest.approx(grads, rel=1e-5)


def test_a_solved_task_goes_to_zero_and_a_lagging_one_rises():
    """Raw weights and shares go to zero; the softmax has a floor, as e^0 = 1."""
    share, softmax = (AchievementLoss(POTENTIALS, normalization=n) for n in ("sum", "softmax"))
    trace = []
    for _ in range(60):
        for loss in (share, softmax):
            loss.update({"a": 0.9 if trace else 0.2, "b": 0.1})  # a is solved, b lags behind
        trace.append((share.raw_weights(), share.weights(), softmax.weights()))
    raw, shares, soft = (torch.stack(series) for series in zip(*trace, strict=True))
    assert raw[0, 0] > 0.5 and raw[-1, 0] == 0
    assert shares[-1].tolist() == [0, 1]
    for series in (shares, soft):
        assert (series[1:, 0] <= series[:-1, 0]).all() and (series[1:, 1] >= series[:-1, 1]).all()
    w = (1 - 0.1 / 0.525) ** 2
    assert soft[-1, 0].item() == pytest.approx(1 / (1 + math.exp(w)), rel=1e-4)
    assert soft[:, 0].min() > 1 / (1 + math.e)


@pytest.mark.parametrize("normalization", ["softmax", "sum"])
def test_equal_weights_without_metrics_and_when_all_is_solved(normalization):
    loss = AchievementLoss(POTENTIALS, normalization=normalization)
    assert values(loss.weights()) == [0.5, 0.5]
    assert loss(LOSSES).item() == pytest.approx(1.0)  # sqrt(2 * 0.5)
    loss.update({"a": 0.9, "b": 0.6})
    assert values(loss.weights()) == [0.5, 0.5]


def test_other_weightings_by_hand():
    a = 0.6, 0.1
    dtp = AchievementLoss(POTENTIALS, weighting="dtp", normalization="sum")
    focal = AchievementLoss(POTENTIALS, weighting="focal", normalization="sum")
    for loss in (dtp, focal):
        loss.update(dict(zip("ab", a, strict=True)))
    assert values(focal.raw_weights()) == [0.16, 0.81]
    assert values(dtp.raw_weights()) == [-0.16 * math.log(0.6), -0.81 * math.log(0.1)]
    zero = AchievementLoss(POTENTIALS, weighting="dtp")
    zero.update({"a": 0.0, "b": 1.0})  # log 0 must not become a NaN
    assert zero.weights().tolist() == pytest.approx([1, 0], abs=1e-6)


def test_a_loss_of_zero_is_no_nan():
    loss = AchievementLoss(POTENTIALS)
    leaf = torch.zeros((), requires_grad=True)
    total = loss({"a": leaf, "b": torch.tensor(1.0)})
    total.backward()
    assert total.isfinite() and leaf.grad.isfinite()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"a": math.nan, "b": 0.5}, "finite.*'a': nan"),
        ({"a": 0.5, "b": math.inf}, "finite.*'b': inf"),
        ({"a": -0.1, "b": 0.5}, "'a': -0.1"),
        ({"a": 0.5}, r"expected one for each of \('a', 'b'\), got \['a'\]"),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, "'c'"),
        ({"a": torch.tensor(math.nan), "b": 0.5}, "finite"),
    ],
)
def test_bad_metrics_raise_and_change_nothing(metrics, message):
    loss = AchievementLoss(POTENTIALS)
    loss.update({"a": 0.3, "b": 0.3})
    with pytest.raises(ValueError, match=message):
        loss.update(metrics)
    assert values(loss.achieved) == [0.3, 0.3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"potentials": {}}, "potentials"),
        ({"potentials": {"a": 0.0}}, "positive.*'a': 0.0"),
        ({"potentials": {"a": math.nan}}, "finite"),
        ({"form": "mean"}, "form: expected one of .*got 'mean'"),
        ({"normalization": "max"}, "normalization"),
        ({"weighting": "equal"}, "weighting"),
        ({"gamma": -1}, "gamma"),
        ({"margin": math.nan}, "margin"),
        ({"momentum": 0}, "momentum"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        AchievementLoss(**{"potentials": POTENTIALS} | arguments)


def test_metrics_must_be_shares_for_other_weightings():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        AchievementLoss(POTENTIALS, weighting="focal").update({"a": 40.0, "b": 0.5})
    AchievementLoss({"a": 60.0, "b": 70.0}).update({"a": 40.0, "b": 0.5})


@pytest.mark.parametrize("form", ["geometric", "sum"])
@pytest.mark.parametrize("normalization", ["softmax", "sum"])
def test_a_batch_may_lack_tasks(form, normalization):
    """Weights of the tasks present are divided by their sum; absent tasks do not count."""
    loss_of = AchievementLoss(
        {"a": 0.8, "b": 0.5, "c": 0.6}, form=form, normalization=normalization
    )
    loss_of.update({"a": 0.2, "b": 0.3, "c": 0.1})
    a, c = (torch.tensor(v, requires_grad=True) for v in (2.0, 5.0))
    w = loss_of.weights()
    share = float(w[0] / (w[0] + w[2]))
    want = share * 2 + (1 - share) * 5 if form == "sum" else 2**share * 5 ** (1 - share)
    loss = loss_of({"c": c, "a": a})
    assert float(loss) == pytest.approx(want, rel=1e-6)
    loss.backward()
    assert a.grad > 0
    assert c.grad > 0
    assert float(loss_of({"b": torch.tensor(3.0)})) == pytest.approx(3.0)


def test_tasks_without_weight_share_a_batch_equally():
    loss_of = AchievementLoss({"a": 0.5, "b": 0.5, "c": 0.5}, form="sum", normalization="sum")
    loss_of.update({"a": 0.9, "b": 0.9, "c": 0.1})
    assert float(loss_of({"a": torch.tensor(2.0), "b": torch.tensor(4.0)})) == 3.0


@pytest.mark.parametrize("losses", [{}, {"x": 1.0}, {"a": 1.0, "x": 1.0}], ids=str)
def test_unknown_losses_raise(losses):
    losses = {task: torch.tensor(v) for task, v in losses.items()}
    with pytest.raises(ValueError, match=r"losses: expected .*got (none|\['x'\])"):
        AchievementLoss({"a": 0.5, "b": 0.5})(losses)


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_state_survives_save_and_load(updates):
    loss = AchievementLoss(POTENTIALS)
    for n in range(updates):
        loss.update({"a": 0.1 * n, "b": 0.2})
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = AchievementLoss({"a": 0.1, "b": 0.1})
    other.load_state_dict(torch.load(file))
    for one in (other, copy.deepcopy(loss)):
        for each in (one, loss):
            each = copy.deepcopy(each)
            each.update({"a": 0.5, "b": 0.4})
            assert torch.equal(each.weights(), _continued(loss).weights())
        assert torch.equal(one.potential, loss.potential)


def _continued(loss):
    loss = copy.deepcopy(loss)
    loss.update({"a": 0.5, "b": 0.4})
    return loss
