"""Nash-MTL over the experts: the tasks bargain over each update, using the package torchjd.

    d = sum_t a_t g_t   with   G G^T a = 1 / a          G (N, P): a row of gradients g_t for each task

A task gains nothing from a loss a hundred times larger.  Requires `pip install torchjd[nash_mtl]`.

    python -m examples.nash_mtl

Source: Navon et al. 2022, Multi-Task Learning as a Bargaining Game, arXiv 2202.01017.
"""

from __future__ import annotations

import torch
from torch import nn

from lora_moe import LoraMoeConfig, inject, use_routing

TASKS, D, SAMPLES = 2, 16, 64
SCALES = (1.0, 100.0)  # of the tasks' losses


def nash_step(optimizer, losses, aggregator) -> list[float]:
    """One update along the Nash bargaining direction of the tasks' gradients; returns the losses before it.

    aggregator is torchjd.aggregation.NashMTL(n_tasks=len(losses)).  One gradient at a time
    (parallel_chunk_size=1), as torch.func's transforms do not reach the experts' operators.
    """
    from torchjd.autojac import backward, jac_to_grad

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    backward(losses, inputs=parameters, parallel_chunk_size=1)
    jac_to_grad(parameters, aggregator)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [loss.item() for loss in losses]


def problem(seed=0):
    """A frozen linear with one shared expert and one expert per task; returns (model, x, targets)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, D))
    inject(model, LoraMoeConfig(num_experts=1 + TASKS, r=4, target_modules=("0",)))
    x = torch.randn(TASKS, SAMPLES, D)
    targets = [model[0].base_layer(x[t]) + x[t] @ torch.randn(D, D) / D for t in range(TASKS)]
    return model, x, [y.detach() for y in targets]


def losses_of(model, x, targets):
    losses = []
    for t in range(TASKS):
        with use_routing(model, task_ids=torch.tensor([[0, 1 + t]]).expand(SAMPLES, 2)):
            losses.append(SCALES[t] * nn.functional.mse_loss(model(x[t]), targets[t]))
    return losses


def main(steps=100):
    from torchjd.aggregation import NashMTL

    model, x, targets = problem()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    aggregator = NashMTL(n_tasks=TASKS)
    first = losses = nash_step(optimizer, losses_of(model, x, targets), aggregator)
    for _ in range(steps - 1):
        losses = nash_step(optimizer, losses_of(model, x, targets), aggregator)
    for t in range(TASKS):
        print(f"task {t}: loss {first[t]:.4f} -> {losses[t]:.4f} ({losses[t] / first[t]:.0%})")
    return first, losses


if __name__ == "__main__":
    main()
