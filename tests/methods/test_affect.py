"""Metrics of affect recognition on examples computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lora_moe.methods.mmolre.affect import (
    multiclass_metrics,
    multilabel_metrics,
    sentiment_metrics,
    weighted_f1,
)


def test_sentiment_by_hand():
    truth = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 0.0])
    guess = torch.tensor([-1.4, 0.5, -0.2, 1.6, 3.9, 0.0])
    found = sentiment_metrics(guess, truth)
    assert found["mae"] == pytest.approx((0.6 + 1.5 + 0.2 + 0.6 + 0.9 + 0.0) / 6)
    # rounded to classes: -1 0 0 2 3 0 against -2 -1 0 1 3 0; halves round to even, 3.9 is clipped
    assert found["acc7"] == pytest.approx(3 / 6)
    # negative against non-negative: predictions - + - + + +, truth - - + + + +
    assert found["acc2_non_negative"] == pytest.approx(4 / 6)
    negative, others = 2 * 1 / (2 + 2), 2 * 3 / (4 + 4)
    assert found["f1_non_negative"] == pytest.approx((2 * negative + 4 * others) / 6)
    # only the four nonzero labels: predictions - + + +, truth - - + +
    assert found["acc2_positive"] == pytest.approx(3 / 4)
    negative, positive = 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)
    assert found["f1_positive"] == pytest.approx((negative + positive) / 2)
    dx, dy = guess - guess.mean(), truth - truth.mean()
    want = (dx * dy).sum() / (dx.square().sum() * dy.square().sum()).sqrt()
    assert found["corr"] == pytest.approx(float(want))


def test_correlation_of_lines_and_of_a_constant():
    y = torch.tensor([1.0, 2.0, 4.0])
    assert sentiment_metrics(3 * y - 1, y)["corr"] == pytest.approx(1)
    assert sentiment_metrics(-y, y)["corr"] == pytest.approx(-1)
    assert math.isnan(sentiment_metrics(torch.ones(3), y)["corr"])


def test_neutral_items_alone_give_no_two_class_metrics():
    found = sentiment_metrics(torch.tensor([1.0, -1.0]), torch.zeros(2))
    assert math.isnan(found["acc2_positive"]) and math.isnan(found["f1_positive"])


def test_shapes_that_differ_raise():
    with pytest.raises(ValueError, match=r"equal shapes with items, got \(3,\) and \(3, 1\)"):
        sentiment_metrics(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"labels: expected \(3, 2\), got \(3,\)"):
        multilabel_metrics(torch.zeros(3, 2), torch.zeros(3))


def test_weighted_f1_by_hand():
    true = torch.tensor([0, 0, 0, 1, 1, 2])
    picked = torch.tensor([0, 0, 1, 1, 3, 0])
    # f1: class 0 4/6, class 1 2/4, class 2 0; class 3 is never true and has weight 0
    assert weighted_f1(picked, true) == pytest.approx((3 * 4 / 6 + 2 * 2 / 4 + 0) / 6)
    logits = torch.nn.functional.one_hot(picked, 4).float()
    found = multiclass_metrics(logits, true)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["weighted_f1"] == pytest.approx(weighted_f1(picked, true))


def test_multilabel_by_hand():
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    there = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]])
    found = multilabel_metrics(there * 2.0 - 1, labels)
    assert found["accuracy"] == pytest.approx(9 / 12)
    f1 = (2 * 2 / (2 + 3), 2 * 1 / (2 + 1), 0.0)
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3)
    assert found["weighted_f1"] == pytest.approx((3 * f1[0] + 1 * f1[1]) / 4)
