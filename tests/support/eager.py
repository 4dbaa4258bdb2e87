"""The stacked formulation that a user would write without this package, differentiable, in x's dtype.

In fp64 it is the reference for values and, through autograd, for gradients: it shares no code with the
package's own backward.
"""

from __future__ import annotations

import torch


def gates(x, router_weight, case, router_bias=None):
    """(p, logits), each (T, E), in fp32, or in fp64 for fp64 inputs."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = x.to(wide) @ router_weight.to(wide).T
    if router_bias is not None:
        logits = logits + router_bias.to(wide)
    p = torch.softmax(logits, -1) if case.gate == "softmax" else torch.sigmoid(logits)
    return p, logits


def router_topk(x, router_weight, case, ids, router_bias=None):
    """(weights, logits, mean_prob, lse) for given ids."""
    p, logits = gates(x, router_weight, case, router_bias)
    weights = p.gather(1, ids.long())
    if case.renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    mean_prob = p.sum(0) / max(len(p), 1)
    return weights, logits, mean_prob, torch.logsumexp(logits, 1)


def grouped_lora(x, lora_A, lora_B, ids, weights, case, base, scaling):
    """y = base + (S * gate) @ B, with every product rounded to x's dtype, as in eager PyTorch."""
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    ids = ids.long()
    valid = ids >= 0
    gate = torch.zeros(len(x), case.E, dtype=weights.dtype)
    gate = gate.scatter_add(1, ids.clamp(min=0), torch.where(valid, weights, 0)) * scaling
    rows = torch.repeat_interleave(torch.arange(case.E), torch.tensor(case.offsets).diff())
    s = x @ lora_A.T
    if case.shared_a:
        s = s.repeat(1, case.E)
    y = (s * gate.to(x.dtype)[:, rows]) @ lora_B
    return y if base is None else base + y


def routed_lora(inputs, case, ids):
    """(y, router outputs...) for given expert ids, so that rounding cannot flip a decision."""
    weights, *rest = router_topk(
        inputs["x"], inputs["router_weight"], case, ids, inputs["router_bias"]
    )
    y = grouped_lora(
        inputs["x"],
        inputs["lora_A"],
        inputs["lora_B"],
        ids,
        weights,
        case,
        inputs["base"],
        inputs["scaling"],
    )
    return y, weights, *rest
