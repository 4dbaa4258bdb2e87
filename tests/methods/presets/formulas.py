"""Every preset at small sizes, and its formula in einsum and loops, without functions of the package.

    Case(make, formula, tasks, mask)      formula(p, x, tasks, mask, train) -> the experts' sum (B, L, D_out)

p holds the layer's tensors by name, x (B, L, D_in), tasks (B,), mask (B, L).
"""

from __future__ import annotations

import functools

import torch

from lora_moe import LoraMoeConfig, presets
from lora_moe.routers import NoisyRouter

from .mixtures import D_OUT, B, Case, L, best, by_token, experts, mixture, shares


def dense(p, x, r, scale, shared=False, **_):
    E = len(p["router_weight"])

    def decide(v, b):
        return dict(enumerate(torch.softmax(p["router_weight"] @ v, 0)))

    return by_token(x, decide, experts(p, E, r, shared), [scale] * E)


moelora = functools.partial(dense, r=2, scale=8 / 6)  # alpha / r of all experts together
hydralora = functools.partial(dense, r=2, scale=8 / 2, shared=True)
loramoe = functools.partial(dense, r=2, scale=8 / 2)


def mola(p, x, **_):
    def decide(v, b):
        g = torch.softmax(p["router_weight"] @ v, 0)
        return shares(g, best(g, 2))

    return by_token(x, decide, experts(p, 4, 2), [8 / 2] * 4)


def adamole(p, x, **_):
    def decide(v, b):
        g = torch.softmax(p["router_weight"] @ v, 0)
        tau = 0.4 * torch.sigmoid(p["threshold_weight"][0] @ v + p["threshold_bias"][0])
        left = {e: g[e] - tau for e in range(4) if g[e] > tau}
        return {e: w / sum(left.values()) for e, w in left.items()}

    return by_token(x, decide, experts(p, 4, 2), [8 / 2] * 4)


def smora(p, x, **_):
    def decide(v, b):
        g = torch.sigmoid(p["router_weight"] @ v)
        gates = shares(g, best(g + p["selection_bias"], 2))
        return {e: 2 * w for e, w in gates.items()}

    return by_token(x, decide, experts(p, 6, 1), [8 / 6] * 6)


def meteora(p, x, **_):
    def decide(v, b):
        logits = p["router_weight"] @ v
        ids = best(logits, 2)
        g = torch.softmax(torch.stack([logits[e] for e in ids]) / 0.7, 0)
        return dict(zip(ids, g, strict=True))

    return by_token(x, decide, experts(p, 4, 2), [8 / 2] * 4)


def mean_token(x, mask, b):
    return sum(x[b, i] for i in range(L) if mask[b, i]) / int(mask[b].sum())


def moa(p, x, mask, **_):
    def decide(v, b):
        return {best(p["router_weight"] @ mean_token(x, mask, b), 1)[0]: 1.0}

    return by_token(x, decide, experts(p, 4, 2), [8 / 2] * 4)


def mtl_lora(p, x, tasks, **_):
    def decide(v, b):
        return dict(enumerate(torch.softmax(p["router_table"][tasks[b]] / 0.5, 0)))

    y = []
    for b in range(B):
        core = p["middle_core"][tasks[b]]
        pairs = [(core @ A, B_e) for A, B_e in experts(p, 3, 2, shared=True)]
        y.append(by_token(x, lambda v, _, b=b: decide(v, b), pairs, [8 / 2] * 3)[b])
    return torch.stack(y)


def poly(p, x, tasks, train, **_):
    if train:
        torch.manual_seed(1)
        u = torch.rand(B, 4, dtype=x.dtype)
    y = []
    for b in range(B):
        logits = p["router_table"][tasks[b]]
        if train:
            logits = logits + torch.log(u[b]) - torch.log(1 - u[b])
        g = torch.sigmoid(logits) / torch.sigmoid(logits).sum()
        pairs = experts(p, 4, 2)
        A = sum(g[e] * pairs[e][0] for e in range(4))
        B_mixed = sum(g[e] * pairs[e][1] for e in range(4))
        y.append(8 / 2 * x[b] @ A.T @ B_mixed.T)
    return torch.stack(y)


def more(p, x, tasks, **_):
    y = []
    for b in range(B):
        logits = p["router_weight"] @ p["task_embedding"][tasks[b]] + p["router_bias"]
        g = torch.softmax(logits, 0)
        e = best(g, 1)[0]
        n = (e + 1) * 2  # of 6
        weight = 1 + g[e] - g[e].detach()
        y.append(8 / 6 * weight * (x[b] @ p["lora_A"][:n].T @ p["lora_B"][:n]))
    return torch.stack(y)


def conditional_mixlora(p, x, mask, **_):
    y = []
    for b in range(B):
        m = mean_token(x, mask, b)
        g = torch.softmax(p["router_weight"] @ m, 0)
        of_a = best(g, 2)
        seen = [
            torch.softmax(p["router_weight_ab"][k] @ p["lora_A"][i], 0) for k, i in enumerate(of_a)
        ]
        q = torch.softmax(p["router_weight_b"] @ m, 0) + torch.softmax(sum(seen), 0)
        q = torch.softmax(q, 0)
        of_b = best(q, 2)
        g, q = shares(g, of_a), shares(q, of_b)
        y.append(
            sum(
                8 / 2 * g[i] * q[j] * (x[b] @ p["lora_A"][i])[:, None] * p["lora_B"][j]
                for i, j in zip(of_a, of_b, strict=True)
            )
        )
    return torch.stack(y)


def smola(p, x, mask, tasks=None, modalities=(-1,) * 4, **_):
    """Two segments of two tokens; padding fills no slot."""
    pairs, y = experts(p, 4, 2), torch.zeros(B, L, D_OUT, dtype=x.dtype)
    rows = [[None] * L for _ in range(B)]
    for b in range(B):
        for start in range(0, L, 2):
            seg = range(start, start + 2)
            logits = {i: p["router_weight"] @ x[b, i] for i in seg}
            out = {}
            for e, (A, B_e) in enumerate(pairs):
                inside = [i for i in seg if mask[b, i] and modalities[e] in (-1, _task(tasks, b))]
                total = sum(torch.exp(logits[i][e]) for i in inside)
                z = sum((torch.exp(logits[i][e]) / total * x[b, i] for i in inside), 0 * x[b, 0])
                out[e] = 8 / 2 * (B_e @ (A @ z))
            for i in seg:
                met = [e for e in out if modalities[e] in (-1, _task(tasks, b))]
                total = sum(torch.exp(logits[i][e]) for e in met)
                rows[b][i] = sum(torch.exp(logits[i][e]) / total * out[e] for e in met)
    return y + torch.stack([torch.stack(row) for row in rows])


def _task(tasks, b):
    return -1 if tasks is None else int(tasks[b])


def modal_smola(p, x, mask, tasks, **_):
    return smola(p, x, mask, tasks, modalities=(-1, 0, 1, 2))


def mlore(p, x, tasks, mask, train, **_):
    ranks = (2, 1, 1, 1, 1, 2, 3)  # generic, 3 tasks, 3 shared
    if train:
        torch.manual_seed(1)
        noise = torch.randn(B, 3, dtype=x.dtype)

    def decide(v, b):
        m = mean_token(x, mask, b)
        logits = p["router_weight"][tasks[b]] @ m
        if train:
            spread = torch.log1p(torch.exp(p["noise_weight"][tasks[b]] @ m)) + 0.01
            logits = logits + noise[b] * spread
        g = torch.softmax(logits, 0)
        return {0: 1.0, 1 + int(tasks[b]): 1.0} | {4 + e: g[e] for e in best(g, 2)}

    return by_token(x, decide, experts(p, 7, ranks), [8 / r for r in ranks])


def c_lorae(p, x, tasks, **_):
    def decide(v, b):
        g = torch.softmax(p["router_weight"] @ v, 0)
        return {0: g[0], 1 + int(tasks[b]): g[1]}

    return by_token(x, decide, experts(p, 4, (3, 1, 1, 1)), [8 / 3, 6, 6, 6])


def branch_lora(p, x, tasks, mask, **_):
    def decide(v, b):
        first = next(i for i in range(L) if mask[b, i])
        g = torch.softmax(p[f"router_weight_{int(tasks[b])}"] @ x[b, first], 0)
        return shares(g, best(g, 2))

    return by_token(x, decide, experts(p, 4, 2, shared=True), [8 / 8] * 4)


def noisy(p, x, train, **_):
    if train:
        torch.manual_seed(1)
        noise = torch.randn(B * L, 4, dtype=x.dtype).view(B, L, 4)
        drop = torch.rand(B * L, 4, dtype=x.dtype).view(B, L, 4)
        free = (drop >= 0.3) | (drop == drop.amax(2, keepdim=True))
    else:
        noise, free = torch.zeros(B, L, 4), torch.ones(B, L, 4, dtype=torch.bool)
    pairs, rows = experts(p, 4, 2), []
    for b in range(B):
        for i in range(L):
            logits = p["router_weight"] @ x[b, i]
            if train:
                spread = torch.log1p(torch.exp(p["noise_weight"] @ x[b, i])) + 0.01
                logits = logits + noise[b, i] * spread
            ids = [e for e in best(logits, 4) if free[b, i, e]][:2]
            g = shares(torch.exp(logits), ids)
            rows.append(mixture(x[b, i], g, pairs, [8 / 2] * 4))
    return torch.stack(rows).view(B, L, -1)


def noisy_router(**fields):
    return LoraMoeConfig(
        num_experts=4,
        r=2,
        top_k=2,
        alpha=8,
        router=NoisyRouter(learned=True, expert_dropout=0.3),
        **fields,
    )


CASES = {
    "moelora": Case(lambda **f: presets.moelora(3, 6, 8, **f), moelora),
    "hydralora": Case(lambda **f: presets.hydralora(3, 2, 8, **f), hydralora),
    "loramoe": Case(lambda **f: presets.loramoe(4, 2, 8, **f), loramoe),
    "mola": Case(lambda **f: presets.mola(4, 2, 2, 8, **f), mola),
    "adamole": Case(lambda **f: presets.adamole(4, 2, 8, max_threshold=0.4, **f), adamole),
    "smora": Case(lambda **f: presets.smora(6, 2, 8, **f), smora),
    "meteora": Case(lambda **f: presets.meteora(4, 2, 2, 8, temperature=0.7, **f), meteora),
    "moa": Case(lambda **f: presets.moa(4, 2, 8, **f), moa, sequence=True),
    "mtl_lora": Case(
        lambda **f: presets.mtl_lora(3, 3, 2, 8, temperature=0.5, **f), mtl_lora, tasks=True
    ),
    "poly": Case(lambda **f: presets.poly(3, 4, 2, 8, **f), poly, tasks=True),
    "more": Case(lambda **f: presets.more(3, 3, 6, 8, **f), more, tasks=True),
    "conditional_mixlora": Case(
        lambda **f: presets.conditional_mixlora(6, 2, 8, **f), conditional_mixlora, sequence=True
    ),
    "smola": Case(lambda **f: presets.smola(4, 2, 8, segments=2, **f), smola, sequence=True),
    "smola_modal": Case(
        lambda **f: presets.smola(4, 2, 8, segments=2, modalities=(-1, 0, 1, 2), **f),
        modal_smola,
        tasks=True,
        sequence=True,
    ),
    "mlore": Case(
        lambda **f: presets.mlore(3, (1, 2, 3), 2, 8, generic_r=2, task_r=1, **f),
        mlore,
        tasks=True,
        sequence=True,
    ),
    "c_lorae": Case(lambda **f: presets.c_lorae(3, 3, 8, task_alpha=6, **f), c_lorae, tasks=True),
    "branch_lora": Case(
        lambda **f: presets.branch_lora(3, 4, 2, 2, 8, **f), branch_lora, tasks=True, sequence=True
    ),
    "noisy": Case(noisy_router, noisy),
}
