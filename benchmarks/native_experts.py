"""LoRA on a MoE model's own fused experts, forward and backward.

    lora-moe bench experts [--tokens 512] [--dtype fp32] [--device cpu] [--repeats 15] [--json FILE] ...

Mixtral's experts of 1024 and 512, E=32, top-4, r=16 on both weights; all contenders from the same values:

    ours          LoraMoeExperts
    PEFT          LoraConfig(target_parameters=...), which makes W + s B A of all experts
    two products  transformers' grouped product, and two more for the LoRA, as a user would write it
    no adapter    the frozen experts; their backward gives the gradients of x and the router's weights alone

A call is the forward and the backward of x, the router's weights and all adapters.  Their outputs agree, or
nothing is timed.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks import machine, timing
from benchmarks.timing import duration
from examples.common import measure
from lora_moe import LoraMoeConfig, LoraMoeExperts
from lora_moe.peft_experts import columns_of

D, F, E, R, K, ALPHA = 1024, 512, 32, 16, 4, 32
NAMES = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREE = {"fp32": 1e-5, "bf16": 3e-2}  # of the largest output
PLAIN = "no adapter"


def main(argv=None):
    args = parse(argv)
    results = {}
    for dtype in args.dtype:
        calls = contenders(args.tokens, DTYPES[dtype], args.device)
        check(calls, AGREE[dtype])
        print(f"{dtype}: {args.repeats} turns of {', '.join(calls)}", file=sys.stderr, flush=True)
        steps = {name: call.step for name, call in calls.items()}
        results[dtype] = {
            "machine": machine.describe() if args.device == "cpu" else torch.cuda.get_device_name(),
            "tokens": args.tokens,
            "seconds": timing.interleave(steps, args.repeats),
            "peak": {name: measure.peak_bytes(step) for name, step in steps.items()},
        }
        if args.json:
            args.json.write_text(json.dumps(results))
    text = "\n".join(markdown(dtype, result) for dtype, result in results.items())
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="lora-moe bench experts",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved turns")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args(argv)


class Call:
    """A contender's forward, and its forward and backward."""

    def __init__(self, forward, given, trained):
        self.forward, self.given, self.trained = forward, given, trained
        self.dy = torch.randn_like(given[0])

    def step(self):
        x, _, weights = self.given
        for tensor in (x, weights, *self.trained):
            tensor.grad = None
        self.forward(*self.given).backward(self.dy)
        if x.is_cuda:
            torch.cuda.synchronize()


def contenders(tokens, dtype, device):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    base = MixtralExperts(config)
    for name, parameter in base.named_parameters():
        nn.init.normal_(parameter, std=NAMES[name][0] ** -0.5)
    base = base.to(device, dtype).requires_grad_(False)
    x = torch.randn(tokens, D).to(device, dtype).requires_grad_()
    weights, ids = torch.softmax(torch.randn(tokens, E), -1).topk(K, -1)
    given = x, ids.to(device), weights.to(device, dtype).requires_grad_()
    pairs = {}
    for name, (D_in, D_out) in NAMES.items():
        A, B = torch.randn(E * R, D_in) * D_in**-0.5, torch.randn(E * R, D_out) * R**-0.5
        pairs[name] = A.to(device, dtype), B.to(device, dtype)
    return {
        "ours": ours(base, given, pairs),
        "PEFT": peft(base, given, pairs),
        "two products": two_products(base, given, pairs),
        PLAIN: Call(base, given, []),
    }


def ours(base, given, pairs):
    targets = tuple(f"experts.{name}" for name in NAMES)
    config = LoraMoeConfig(r=R, alpha=ALPHA, target_parameters=targets, adapter_dtype="base")
    layer = LoraMoeExperts(base, config)
    with torch.no_grad():
        for own, pair in zip(layer.pairs(), pairs.values(), strict=True):
            for parameter, value in zip(own, pair, strict=True):
                parameter.copy_(value)
    return Call(layer, given, list(layer.adapter_state().values()))


def peft(base, given, pairs):
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.experts = copy.deepcopy(base)
    targets = [f"experts.{name}" for name in NAMES]
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_parameters=targets, target_modules=[])
    holder = get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model
    layer = wrapper = holder.experts
    while hasattr(wrapper, "parameter_name"):
        A, B = pairs[wrapper.parameter_name]
        wrapper.lora_A["default"].weight.data.copy_(A)
        wrapper.lora_B["default"].weight.data.copy_(columns_of(B, E))
        wrapper = wrapper.base_layer
    return Call(layer, given, [p for p in layer.parameters() if p.requires_grad])


def two_products(base, given, pairs):
    """Of the slots sorted by expert: y = x W_e + s (x A_e^T) B_e, three grouped products."""
    from transformers.integrations.moe import _grouped_mm as grouped

    pairs = {
        name: (A.view(E, R, -1).clone().requires_grad_(), B.view(E, R, -1).clone().requires_grad_())
        for name, (A, B) in pairs.items()
    }

    def linear(name, x, ends):
        A, B = pairs[name]
        low = grouped(x, A.transpose(1, 2), ends)
        return grouped(x, getattr(base, name).transpose(1, 2), ends) + ALPHA / R * grouped(
            low, B, ends
        )

    def forward(x, ids, weights):
        sorted_ids, order = torch.sort(ids.flatten())
        experts = torch.arange(E, device=ids.device)
        ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
        h = linear("gate_up_proj", x[order // K], ends)
        h = linear("down_proj", base._apply_gate(h), ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, h)

    return Call(forward, given, [t for pair in pairs.values() for t in pair])


@torch.no_grad()
def check(calls, agree):
    want = calls["ours"].forward(*calls["ours"].given).float()
    for name, call in calls.items():
        error = (call.forward(*call.given).float() - want).abs().max() / want.abs().max()
        if (error > agree) != (name == PLAIN):
            raise SystemExit(f"{name} differs from ours by {error:.3g}")


def markdown(dtype, result):
    seconds, peak = result["seconds"], result["peak"]
    lines = [
        f"{result['machine']}; {dtype}; {result['tokens']} tokens; medians of"
        f" {len(seconds['ours'])} interleaved turns, quartiles in brackets.",
        "",
        "| | forward + backward | / ours | peak of a call |",
        "|---|---:|---:|---:|",
    ]
    for name, samples in seconds.items():
        memory = "" if peak[name] is None else f"{peak[name] / 2**20:.0f} MiB"
        ratio = timing.ratio(samples[: len(seconds["ours"])], seconds["ours"])
        lines.append(f"| {name} | {duration(statistics.median(samples))} | {ratio} | {memory} |")
    plain = timing.ratio(seconds["ours"], seconds[PLAIN])
    return "\n".join([*lines, "", f"- ours: {plain} times the un-adapted experts'"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
