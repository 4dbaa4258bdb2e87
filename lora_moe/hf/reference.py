"""Reference: the initial policy, for DPO and similar methods, without a second model.

With fresh experts (B = 0) the policy equals the base, so the reference is the policy with disabled experts.
If experts were trained before, or there are modules_to_save, it keeps a copy of the trainable parameters.
The base is always shared.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from .. import forward_records
from ..steering import disable_adapters, layers_of


class Reference(nn.Module):
    """Calls the policy with the values that it had when this was created; has no parameters.

    Missing attributes come from the policy (config, get_output_embeddings, ...).  It always runs without
    gradients.

    Args:
        policy: a model with experts.
    Raises:
        ValueError: if it has no experts.
    """

    def __init__(self, policy: nn.Module):
        super().__init__()
        layers = layers_of(policy).values()
        self.__dict__["policy"] = policy  # not a submodule: .eval() must not affect the policy
        fresh = not any(layer.config.modules_to_save for layer in layers)
        fresh = fresh and not any(bool(B.any()) for layer in layers for _, B in layer.pairs())
        self.__dict__["start"] = None if fresh else _what_trains(policy)

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        if self.start is None:
            with disable_adapters(self.policy):
                return self.policy(*args, **kwargs)
        self._follow()
        with _nothing_noted(self.policy):
            return functional_call(self.policy, self.start, args, kwargs)

    def _follow(self):
        """Move the copy to the policy's device, which may have changed."""
        name, value = next(iter(self.start.items()))
        if value.device != self.policy.get_parameter(name).device:
            tensors = {**dict(self.policy.named_parameters()), **dict(self.policy.named_buffers())}
            for name, value in self.start.items():
                self.start[name] = value.to(tensors[name].device)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.policy, name)

    def __setattr__(self, name, value):
        # TRL and accelerate replace a model's forward; the policy's is already replaced
        if name != "forward":
            super().__setattr__(name, value)


def _what_trains(policy):
    """{name: copy} of all trainable parameters, and of buffers that affect routing."""
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    named |= {n: b for n, b in policy.named_buffers() if n.endswith(".selection_bias")}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


class _nothing_noted:
    """Restore the layers' forward records on exit."""

    def __init__(self, model):
        self.records = [forward_records.record_of(layer) for layer in layers_of(model).values()]

    def __enter__(self):
        self.before = [(r.last, r.training, r.evaluation) for r in self.records]

    def __exit__(self, *_):
        for record, (last, training, evaluation) in zip(self.records, self.before):
            record.last, record.training, record.evaluation = last, training, evaluation
