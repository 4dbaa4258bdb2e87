"""EMTL's weights minimize their objective; Nash-MTL's example, if torchjd is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lora_moe.methods.equitable import EquitableLoss, equitable_weights

LOSSES = torch.tensor([2.0, 0.5, 30.0], dtype=torch.float64)
NORMS = torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64)


def objective(w, strength):
    c = LOSSES / NORMS
    share = w / (c / c.mean())
    return (w - 1 / 3).square().sum() + strength * (share - share.mean()).square().mean()


@pytest.mark.parametrize("strength", [0.0, 0.3, 5.0])
def test_weights_minimize_the_objective(strength):
    w = equitable_weights(LOSSES, NORMS, strength).requires_grad_()
    assert w.sum().item() == pytest.approx(1) and (w > 0).all()
    (grad,) = torch.autograd.grad(objective(w, strength), w)
    assert (grad - grad.mean()).abs().max() < 1e-12  # stationary along sum w = 1
    if strength:
        assert (w - 1 / 3).abs().max() > 0.02
    else:
        torch.testing.assert_close(w, torch.full_like(w, 1 / 3))


def test_a_large_strength_gives_every_task_the_same_share_of_its_loss():
    w = equitable_weights(LOSSES, NORMS, 1e9)
    share = w * NORMS / LOSSES
    torch.testing.assert_close(share, share.mean().expand(3), rtol=1e-6, atol=0)


def test_loss_and_gradient():
    """L_t = scale_t * sum_i p_i^2 / 2 over half of p, so ||g_t|| = scale_t * ||half of p||."""
    p = torch.tensor([3.0, 4.0, 6.0, 8.0], dtype=torch.float64, requires_grad=True)
    losses = {"a": p[:2].square().sum() / 2, "b": 10 * p[2:].square().sum() / 2}
    got = EquitableLoss(2.0)(losses, [p, torch.nn.Parameter(torch.ones(1), requires_grad=False)])
    w = equitable_weights(
        torch.tensor([12.5, 500.0]).double(), torch.tensor([5.0, 100.0]).double(), 2.0
    )
    assert got.item() == pytest.approx((w @ torch.tensor([12.5, 500.0]).double()).item())
    got.backward()
    want = torch.cat([w[0] * p[:2], 10 * w[1] * p[2:]])
    torch.testing.assert_close(p.grad, want.detach())


def test_what_it_refuses():
    for strength in (-1, float("nan"), "1", True):
        with pytest.raises(ValueError, match="strength"):
            EquitableLoss(strength)
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="at least one loss"):
        EquitableLoss()({}, [p])
    with pytest.raises(ValueError, match="at least one loss"):
        EquitableLoss()({"a": p.sum()}, [p.detach()])
    with pytest.raises(ValueError, match="got b"):
        EquitableLoss()({"a": p.sum(), "b": p}, [p])


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torchjd", "cvxpy", "ecos")),
    reason="needs torchjd[nash_mtl]",
)
def test_nash_mtl_bargains():
    from torchjd.aggregation import NashMTL

    from examples import nash_mtl

    model, x, targets = nash_mtl.problem()
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = nash_mtl.losses_of(model, x, targets)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])  # (N, P)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    nash_mtl.nash_step(optimizer, losses, NashMTL(n_tasks=2, max_norm=0))
    moved = torch.cat([(b - p).detach().flatten() for b, p in zip(before, parameters, strict=True)])
    a = torch.linalg.lstsq(G.T, moved).solution
    torch.testing.assert_close(a @ G, moved, rtol=1e-3, atol=1e-5)
    assert (a > 0).all()
    product = (G @ G.T @ a) * a  # equal for all tasks
    assert product[0] / product[1] == pytest.approx(1, rel=0.01)
    first, last = nash_mtl.main(steps=40)
    assert all(after < 0.7 * start for start, after in zip(first, last, strict=True))
