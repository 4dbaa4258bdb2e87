"""MixLoRA's experts around an FFN, forward and backward.

    lora-moe bench ffn [--tokens 480] [--dtype fp32] [--repeats 15] [--fresh] [--json FILE] ...

The sizes of SmolLM2-135M's FFN, 576 and 1536, E=8, r=8, k=2; all contenders from the same weights:

    ours        LoraMoeMLP
    mixlora     the mixlora package's own code, if it is installed
    loop        over experts, gathering the tokens of each and running the last map once: what a user writes
    no adapter  the frozen FFN; its backward gives the gradient of x alone

A call is the forward, and the backward for x and all adapters.  The outputs agree, or nothing is timed.
Freed memory is kept for the next call, as inside a model, where larger tensors are allocated and freed in
between; --fresh uses glibc's defaults, which map the largest results of a lone FFN anew in each call.
"""

import sys

import torch
from torch import nn

from benchmarks import one_layer
from benchmarks.one_layer import PLAIN, Call
from lora_moe import LoraMoeConfig, LoraMoeMLP

D, F, E, R, K = 576, 1536, 8, 8, 2
NAMES = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}


class FeedForward(nn.Module):
    """Llama's FFN."""

    def __init__(self):
        super().__init__()
        for name, (D_in, D_out) in NAMES.items():
            self.add_module(name, nn.Linear(D_in, D_out, bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def main(argv=None):
    args = one_layer.parse(argv, "ffn", __doc__, tokens=480)
    return one_layer.main(args, lambda dtype: contenders(args.tokens, dtype, args.device), "FFN's")


def contenders(tokens, dtype, device):
    torch.manual_seed(0)
    base = FeedForward().to(device, dtype).requires_grad_(False)
    x = torch.randn(1, tokens, D).to(device, dtype).requires_grad_()
    W, pairs = (torch.randn(E, D) * D**-0.5).to(device), {}
    for name, (D_in, D_out) in NAMES.items():
        A, B = torch.randn(E * R, D_in) * D_in**-0.5, torch.randn(E * R, D_out) * R**-0.5
        pairs[name] = A.to(device, dtype), B.to(device, dtype)
    calls = {"ours": ours(base, x, W, pairs), "loop": loop(base, x, W, pairs)}
    try:
        calls["mixlora"] = mixlora(base, x, W, pairs)
    except ImportError as error:
        print(f"mixlora is left out: {error}", file=sys.stderr)
    plain = FeedForward().to(device, dtype).requires_grad_(False)
    plain.load_state_dict(base.state_dict())
    return calls | {PLAIN: Call(plain, (x,), [])}


def ours(base, x, W, pairs):
    inner = FeedForward().to(x.device, x.dtype).requires_grad_(False)
    inner.load_state_dict(base.state_dict())
    config = LoraMoeConfig(
        num_experts=E, r=R, alpha=2.0 * R, top_k=K, placement="ffn", target_modules=tuple(NAMES),
        adapter_dtype="base",
    )  # fmt: skip
    layer = LoraMoeMLP(inner, config)
    with torch.no_grad():
        layer.router_weight.copy_(W)
        for name, (A, B) in pairs.items():
            for parameter, value in zip(layer.pair(name), (A, B), strict=True):
                parameter.copy_(value)
    return Call(layer, (x,), list(layer.adapter_state().values()))


def loop(base, x, W, pairs):
    W = W.clone().requires_grad_()
    pairs = {n: tuple(t.clone().requires_grad_() for t in pair) for n, pair in pairs.items()}

    def lora(name, v, e):
        A, B = (t[e * R : (e + 1) * R] for t in pairs[name])
        return 2.0 * (v @ A.T) @ B

    def forward(x):
        rows = x.view(-1, D)
        weights, ids = torch.softmax(rows.float() @ W.T, -1).topk(K, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        gate, up = base.gate_proj(rows), base.up_proj(rows)
        mixed, down = torch.zeros_like(gate), torch.zeros_like(rows)
        for e in range(E):
            t, slot = torch.where(ids == e)
            own = rows[t]
            h = base.act_fn(gate[t] + lora("gate_proj", own, e)) * (up[t] + lora("up_proj", own, e))
            h = h * weights[t, slot, None]
            mixed = mixed.index_add(0, t, h)
            down = down.index_add(0, t, lora("down_proj", h, e))
        return (base.down_proj(mixed) + down).view(x.shape)

    return Call(forward, (x,), [W, *(t for pair in pairs.values() for t in pair)])


def mixlora(base, x, W, pairs):
    from mixlora.config import MixLoraConfig
    from mixlora.model import LoraLinear, MixLoraSparseMoe

    config = MixLoraConfig(
        base_model_="", task_type_="CAUSAL_LM", peft_type_="MIXLORA", model_type_="llama",
        dtype_=x.dtype, lora_r_=R, lora_alpha_=2 * R, lora_dropout_=0.05, use_dora_=False,
        use_rslora_=False, lora_init_="original", num_experts_=E, top_k_=K, jitter_noise_=0.0,
        act_fn_="silu", routing_strategy_="mixlora",
    )  # fmt: skip
    layer = MixLoraSparseMoe(base, config)
    layer.gate_ = W.to(x.dtype).requires_grad_()
    trained = [layer.gate_]
    for name, (A, B) in pairs.items():
        for e in range(E):
            rows = slice(e * R, (e + 1) * R)
            expert = LoraLinear(getattr(base, name), config, (A[rows], B[rows].T)).eval()
            own = [expert.lora_A.weight, expert.lora_B.weight]
            trained += [t.requires_grad_() for t in own]
            layer.experts_[f"experts.{e}.{name}"] = expert
    return Call(layer, (x,), trained)


if __name__ == "__main__":
    sys.exit(main())
