"""Stage `train`: a step of four Llama-7B-shaped blocks with random weights, all linears
adapted.

Facts: seconds per step and peak memory with ours, a loop over experts, stacked matmuls and one LoRA with
as many active parameters.  Check: our loss differs from the loop's, with equal weights, by at most 1%.
"""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

from lora_moe import LoraMoeConfig, LoraMoeLinear

from .. import peers

E, r, K, STEPS = 8, 16, 2, 5


class Block(nn.Module):
    """Attention and SwiGLU of Llama, without rotary positions, which need no matmul."""

    def __init__(self, width, inner, heads, wrap):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (wrap(width, width) for _ in range(4))
        self.gate, self.up, self.down = wrap(width, inner), wrap(width, inner), wrap(inner, width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Peer(nn.Module):
    """A frozen linear plus one of peers.py, with the weights of the layer it is compared with."""

    def __init__(self, layer, peer):
        super().__init__()
        self.weight, self.forward_of = layer.weight, peer.forward
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        self.router = nn.Parameter(layer.router_weight.detach().to(a.dtype))
        if peer.name == "loop":
            a, b = a.chunk(E), b.chunk(E)
        elif peer.name == "plain LoRA":
            a, b = [a[: K * r]], [b[: K * r].T.contiguous()]
        else:
            a, b = [a], [b]
        self.a, self.b = (nn.ParameterList([nn.Parameter(t.clone()) for t in ts]) for ts in (a, b))
        self.separate = peer.name == "loop"

    def forward(self, x):
        rows = x.flatten(0, -2)
        a, b = (self.a, self.b) if self.separate else (self.a[0], self.b[0])
        y = F.linear(rows, self.weight) + self.forward_of(rows, self.router, a, b, K)
        return y.view(*x.shape[:-1], -1)


def main(tell, device, dry):
    width, inner, heads, blocks = (32, 64, 2, 1) if dry else (4096, 11008, 32, 4)
    batch = (1, 6) if dry else (2, 2048)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, width, generator=g).to(device, torch.bfloat16)
    losses = {}
    for name in ("ours", "loop", "stacked", "plain LoRA"):
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model = nn.Sequential(
                *(Block(width, inner, heads, wrapper(name, device)) for _ in range(blocks))
            ).to(device, torch.bfloat16)
            seconds, losses[name] = train(model, x, 2 if dry else STEPS)
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
            told = f"{seconds * 1e3:.1f} ms, peak {peak:.2f} GiB, loss {losses[name]:.4f}"
            tell(f"{name}: a step", None, told)
            del model
        except torch.OutOfMemoryError as error:
            tell(f"{name}: a step", False if name == "ours" else None, str(error).splitlines()[0])
    if {"ours", "loop"} <= set(losses):
        apart = abs(losses["ours"] / losses["loop"] - 1)
        tell("ours ends at the loop's loss", apart < 0.01, f"{apart:.2e} apart")


def wrapper(name, device):
    """Linears with equal weights for every contender: drawn from the same seed in the same order."""
    generator = torch.Generator().manual_seed(1)
    peer = next((p for p in peers.PEERS if p.name == name), None)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(
            device, torch.bfloat16
        )

    def wrap(D_in, D_out):
        base = nn.Linear(D_in, D_out, bias=False, device=device, dtype=torch.bfloat16)
        base.weight = nn.Parameter(draw(D_out, D_in), requires_grad=False)
        config = LoraMoeConfig(num_experts=E, r=r, top_k=K, alpha=r, adapter_dtype="base")
        layer = LoraMoeLinear(base, config)
        with torch.no_grad():
            layer.lora_A.copy_(draw(*layer.lora_A.shape))
            layer.lora_B.copy_(draw(*layer.lora_B.shape))
            layer.router_weight.copy_(draw(*layer.router_weight.shape))
        return layer if peer is None else Peer(layer, peer)

    return wrap


def train(model, x, steps):
    """Median seconds per step after the first, and the last loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = (model(x).float() - x.float().roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[(len(taken) - 1) // 2], float(loss.detach())
