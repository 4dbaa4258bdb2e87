"""Stage `tiles`: thousands of tokens with every plan against fp64, and the same bits twice.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's rank.
"""

from __future__ import annotations

import torch

from lora_moe import functional as F
from lora_moe import plan

K, r, D_IN, D_OUT = 2, 16, 1024, 768
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# in units: results rounded twice err by 0.6; fp32 sums of a thousand products by a dozen; logits are fp32
LIMIT = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 40.0}
LOGITS = 16.0


def main(tell, device, dry):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens, experts = ([33], [2]) if dry else ([4097, 8192, 8449], [8, 16, 64])
    sizes = (48, 40) if dry else (D_IN, D_OUT)
    for T in tokens:
        for E in experts:
            for dtype in [torch.bfloat16] if dry else list(UNIT):
                v = sample(T, E, sizes, dtype, device)
                for chosen in plan.PLANS[:2]:
                    check(tell, f"T={T} E={E} {dtype} {chosen}".replace("torch.", ""), chosen, *v)


def sample(T, E, sizes, dtype, device):
    """x, W, A, B, base and dy, of order one."""
    g = torch.Generator().manual_seed(T + E)
    D_in, D_out = sizes

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, generator=g) * scale).to(device, dtype)

    return (
        normal(T, D_in),
        normal(E, D_in, scale=D_in**-0.5, dtype=torch.float32),
        normal(E * r, D_in, scale=D_in**-0.5),
        normal(E * r, D_out, scale=(K * r) ** -0.5),
        normal(T, D_out, scale=0.5),
        normal(T, D_out),
    )


def check(tell, name, chosen, x, w, a, b, base, dy):
    with plan.override(chosen):
        first, again = (ours(x, w, a, b, base, dy) for _ in range(2))
    routing, got = first[0], dict(zip(("y", "dx", "dW", "dA", "dB"), first[1:]))
    tell(f"{name}: equal bits twice", all(map(torch.equal, first[1:], again[1:])))
    logits, ids, want = truth(x, w, a, b, base, dy, routing.indices.long())
    tell_error(tell, f"{name}: logits", routing.logits, logits, torch.float32, LOGITS)
    apart = int((routing.indices.sort(1).values != ids.sort(1).values).sum())
    tell(
        f"{name}: picked experts",
        apart <= 1 + ids.numel() // 10_000,
        f"{apart} of {ids.numel()} differ",
    )
    for what, value in got.items():
        dtype = torch.float32 if what == "dW" else x.dtype
        limit = LIMIT[x.dtype] if what != "dW" else LOGITS * 4
        tell_error(tell, f"{name}: {what}", value, want[what], dtype, limit)


def tell_error(tell, what, got, want, dtype, limit):
    error = float((got.detach().double() - want).norm() / want.norm()) / UNIT[dtype]
    tell(what, error <= limit, f"{error:.2f} of {limit} units")


def ours(x, w, a, b, base, dy):
    leaves = [v.detach().requires_grad_() for v in (x, w, a, b)]
    y, routing = F.routed_lora(*leaves, K, rank_offsets=r, base=base)
    return routing, y.detach(), *torch.autograd.grad(y, leaves, dy)


def truth(x, w, a, b, base, dy, picked):
    """Logits, ids, and y and the gradients for the picked experts, all in fp64 with autograd."""
    leaves = [v.double().requires_grad_() for v in (x, w, a, b)]
    x, w, a, b = leaves
    logits = x @ w.T
    gates = logits.softmax(1).gather(1, picked)
    gates = gates / gates.sum(1, keepdim=True)
    spread = torch.zeros_like(logits).scatter(1, picked, gates)
    y = base.double() + ((x @ a.T) * spread.repeat_interleave(r, 1)) @ b
    grads = torch.autograd.grad(y, leaves, dy.double())
    values = dict(zip(("dx", "dW", "dA", "dB"), grads)) | {"y": y.detach()}
    return logits.detach(), logits.topk(K, 1).indices, values
