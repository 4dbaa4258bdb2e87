"""Standard metrics of sentiment and emotion (CMU-MOSI, CMU-MOSEI and similar data sets).

Sentiment is a score, usually in [-3, 3]; emotions are a class, or a set of labels.  F1 of a class c is
2 TP / (2 TP + FP + FN), zero if that is 0 / 0; weighted F1 is its mean over the classes, weighted by their
true frequency.
"""

from __future__ import annotations

import torch


def sentiment_metrics(prediction: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """MAE, Pearson's correlation, seven-class accuracy, and two-class accuracy and F1 in both conventions.

    Args:
        prediction, truth: N scores, of the same shape.
    Returns:
        mae            mean |prediction - truth|
        corr           Pearson's correlation; NaN if one side is constant
        acc7           both sides clipped to [-3, 3] and rounded (half to even) to one of seven classes
        acc2_non_negative, f1_non_negative    negative against non-negative: < 0 against >= 0, all items
        acc2_positive, f1_positive            negative against positive: items whose truth is 0 are left
                                              out, the others are < 0 against > 0; a prediction of
                                              exactly 0 counts as negative
        F1 is weighted over the two classes.  NaN if no item is left.
    Raises:
        ValueError: if shapes differ, or there are no items.
    """
    p, y = _pair(prediction, truth)
    sides = y != 0
    return {
        "mae": float((p - y).abs().mean()),
        "corr": _pearson(p, y),
        "acc7": _share(p.clamp(-3, 3).round() == y.clamp(-3, 3).round()),
        "acc2_non_negative": _share((p >= 0) == (y >= 0)),
        "f1_non_negative": weighted_f1((p >= 0).long(), (y >= 0).long()),
        "acc2_positive": _share((p > 0)[sides] == (y > 0)[sides]),
        "f1_positive": weighted_f1((p > 0)[sides].long(), (y > 0)[sides].long()),
    }


def multiclass_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy and weighted F1 of the largest logit.

    Args:
        logits: (N, C).
        labels: (N,) class ids.
    """
    picked = logits.argmax(1)
    return {"accuracy": _share(picked == labels), "weighted_f1": weighted_f1(picked, labels)}


def multilabel_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy and F1 of C labels, each predicted if its logit is positive.

    Args:
        logits, labels: (N, C), labels of 0 and 1.
    Returns:
        accuracy       fraction of all N * C decisions that are correct
        weighted_f1    mean F1 of the labels, weighted by their true frequency
        macro_f1       the same, unweighted
    """
    there, true = logits > 0, labels > 0.5
    if there.shape != true.shape or there.dim() != 2:
        raise ValueError(f"labels: expected {tuple(there.shape)}, got {tuple(true.shape)}")
    f1 = _f1(there, true)  # (C,)
    support = true.sum(0).double()
    return {
        "accuracy": _share(there == true),
        "weighted_f1": float((f1 * support).sum() / support.sum().clamp(min=1)),
        "macro_f1": float(f1.mean()),
    }


def weighted_f1(picked: torch.Tensor, true: torch.Tensor) -> float:
    """Mean of the classes' F1, weighted by true frequency; NaN without items.  (N,), (N,)"""
    if not true.numel():
        return float("nan")
    classes = torch.cat([picked, true]).unique()
    hot = true[:, None] == classes  # (N, C)
    support = hot.double().mean(0)
    return float((_f1(picked[:, None] == classes, hot) * support).sum())


def _f1(picked, true):
    """F1 per column of two (N, C) bool tensors."""
    hits = (picked & true).sum(0).double()
    return 2 * hits / (picked.sum(0) + true.sum(0)).clamp(min=1)


def _pair(prediction, truth):
    if prediction.shape != truth.shape or not truth.numel():
        shapes = f"{tuple(prediction.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"prediction, truth: expected equal shapes with items, got {shapes}")
    return prediction.detach().double().flatten(), truth.detach().double().flatten()


def _pearson(p, y):
    p, y = p - p.mean(), y - y.mean()
    scale = p.norm() * y.norm()
    return float(p @ y / scale) if scale > 0 else float("nan")


def _share(right):
    return float(right.double().mean())
