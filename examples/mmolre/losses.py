"""Losses relative to the constant predictor's loss, which is 1 in every task.

The constant predictor outputs the training labels' median (sentiment) or base rates (the others).
"""

import torch
import torch.nn.functional as F

from examples.mmolre.arms import TASKS
from lora_moe.methods import mmolre


def constants(labels):
    """{task: (outputs,)} of the constant predictor: the median, or the log-odds of the base rates."""
    return {
        name: labels[name].nanmedian(0, keepdim=True).values
        if task.loss == "mae"
        else labels[name].nanmean(0).logit()
        for name, task in TASKS.items()
    }


def scales(labels):
    """{task: mean loss of the constant predictor on the training labels}"""
    return {
        name: float(of[~of.isnan()].mean())
        for name, of in item_losses(spread(constants(labels), labels), labels).items()
    }


def spread(constant, labels):
    """The constant predictor's outputs for these items: {task: (B, outputs)}"""
    return {name: of.expand(len(labels[name]), -1) for name, of in constant.items()}


def item_losses(outputs, labels):
    """{task: losses (B,)}; NaN where the label is missing."""
    found = {}
    for name, output in outputs.items():
        label = labels[name].view_as(output)
        missing = label.isnan().any(1)
        kind = F.l1_loss if TASKS[name].loss == "mae" else F.binary_cross_entropy_with_logits
        each = kind(output, label.nan_to_num(), reduction="none").mean(1)
        found[name] = each.masked_fill(missing, torch.nan)
    return found


def normalized(model, items, scale):
    """{task: mean loss over the labeled items, divided by the constant predictor's}"""
    losses = mmolre.task_losses(model.config, forward(model, items), items.labels)
    return {name: loss / scale[name] for name, loss in losses.items()}


def forward(model, items):
    names = model.config.modalities
    return model({n: items.features[n] for n in names}, {n: items.masks[n] for n in names})
