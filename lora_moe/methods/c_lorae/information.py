"""mutual_information_loss, between the outputs of the universal and the task experts.

Letters: B samples, L tokens each, D_in and D_out the linear's sizes.
"""

from __future__ import annotations

import torch
from torch import nn

from ... import functional as F
from ...components import one_of
from ...layers import LoraMoeLinear
from ...recompute import recomputing
from ...routing import Routing


class Pooling:
    """Forward hook that stores each sample's mean token and task.

    An expert is linear, so the mean of its outputs is its output for the mean token: B rows of work
    instead of T.

    Attributes:
        mean: (B, D_in) of the last forward, with its graph; initially None.
    """

    def __init__(self, layer: LoraMoeLinear):
        self.layer = layer
        self.mean: torch.Tensor | None = None
        self.tasks: torch.Tensor | None = None

    @staticmethod
    def attach(layer: LoraMoeLinear) -> None:
        if not any(True for _ in Pooling.of(layer)):
            layer.register_forward_hook(Pooling(layer))

    @staticmethod
    def of(module: nn.Module):
        """Yield the module's hook, if it has one."""
        return (hook for hook in module._forward_hooks.values() if isinstance(hook, Pooling))

    def __call__(self, layer, args, _output):
        if recomputing() or layer.routing is None:
            return
        (x, *_) = args
        self.mean = x.flatten(1, -2).mean(1) if x.dim() > 2 else x
        # expert 1 + t belongs to task t; every row has the universal expert 0
        second = layer.routing.indices.amax(1)  # (T,)
        self.tasks = second.view(self.mean.shape[0], -1)[:, 0].long() - 1

    def representations(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """u, d (B, D_out): both experts' ungated outputs, averaged over each sample's tokens; tasks (B,).

        d is zero if a sample has no task.
        """
        layer, tasks = self.layer, self.tasks
        ids = torch.cat([torch.zeros_like(tasks), torch.where(tasks < 0, tasks, tasks + 1)])
        routing = Routing.from_ids(ids, num_experts=layer.config.num_experts)
        both = F.grouped_lora(
            torch.cat([self.mean, self.mean]), layer.lora_A, layer.lora_B, routing,
            rank_offsets=layer.offsets, scaling=layer.scaling, frozen=layer.frozen,
        )  # fmt: skip
        return *both.chunk(2), tasks

    def __getstate__(self):
        """For copies and pickles, without the last forward's graph."""
        return self.__dict__ | {"mean": None, "tasks": None}


NEGATIVES = ("batch", "task")


def mutual_information_loss(
    model: nn.Module, temperature: float = 0.1, negatives: str = "batch"
) -> torch.Tensor:
    """Mean over layers of InfoNCE(u, d): lower means more information between the two experts' outputs.

        L = -mean_b log( exp(cos(u_b, d_b) / tau) / sum_c exp(cos(u_b, d_c) / tau) ),   I(u; d) >= log B - L

    u_b and d_b are a sample's universal and task representation (Pooling.representations).
    Add it to the loss with a small coefficient: maximizing the bound keeps the task expert informative about
    the same samples as the universal one.  The paper states that C-LoRAE maximizes a mutual information.  The
    two variables (task and gate would be equally plausible), this bound, the pooling (over all positions,
    including padding) and the temperature are inferred.

    Args:
        model: injected with mutual_information=True, after a forward.
        temperature: tau.
        negatives: the c of the sum.  "batch": all samples with a task.  "task": samples of b's task, so
            that distinguishing tasks does not lower the loss, and the universal expert does not learn to.
            It is unknown which one C-LoRAE uses.
    Returns:
        0-dim, fp32 (fp64), differentiable.
    Raises:
        ValueError: if no layer has mutual_information=True, or negatives is invalid.
        RuntimeError: if no forward has run yet.
    Source of the bound: van den Oord et al. 2018 (CPC), arXiv 1807.03748, eq. 4-5.
    """
    poolings = [p for module in model.modules() for p in Pooling.of(module)]
    if not poolings:
        raise ValueError("model: expected layers with mutual_information=True, got none")
    ran = [pooling for pooling in poolings if pooling.mean is not None]
    if not ran:
        raise RuntimeError("model: expected a forward before this call, but no layer has run yet")
    losses = [info_nce(*pooling.representations(), temperature, negatives) for pooling in ran]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def info_nce(u, d, tasks, temperature: float = 0.1, negatives: str = "batch") -> torch.Tensor:
    """-mean_b log softmax_c(cos(u_b, d_c) / tau)[b] over the samples with a task.  u, d (B, D), tasks (B,)

    negatives="task" takes the softmax only over the samples of b's task.
    """
    one_of("negatives", negatives, NEGATIVES)
    idle = tasks < 0
    left_out = idle if negatives == "batch" else tasks[:, None] != tasks  # (B,) or (B, B)
    logits = (_unit(u) @ _unit(d).T / temperature).masked_fill(left_out, -torch.inf)  # (B, B)
    own = torch.arange(len(u), device=u.device).masked_fill(idle, -100)
    return nn.functional.cross_entropy(logits, own, reduction="sum") / (~idle).sum().clamp(min=1)


def _unit(v):
    """v / sqrt(|v|^2 + eps): experts start at exactly 0, where a plain cosine has no gradient."""
    v = v if v.dtype == torch.float64 else v.float()
    return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + 1e-4)
