"""Gates per sample: PEFT's Poly layer beside presets.poly and a shared A, forward and backward.

    python -m benchmarks.per_sample [--turns 21] [--threads 2] [--only added] [--eval]

    added   the base's output is kept, so only the adapters are timed; PEFT adds to it in place, ours reads it
    layer   with the frozen base: its forward, and its term of dx

"per token" is ours without mixing the experts once per sample (lora_moe/per_sample.py), for comparison.
Ratios are PEFT's seconds over a contender's in the same turn: median [quartiles].  E = 8, r = 8.
"""

import argparse
import itertools
import statistics
from unittest import mock

import torch
from torch import nn

from benchmarks import machine, timing
from lora_moe import LoraMoeConfig, LoraMoeLinear, plan, presets, use_routing
from lora_moe.routers import SequenceRouter, TaskRouter

E, R, TASKS = 8, 8, 8
SHAPES = ((480, 576, 1536), (2048, 1024, 1024))  # T, D_in, D_out
SAMPLES = (4, 8)
THEIRS = "PEFT Poly"


class Kept(nn.Linear):
    """A linear layer that returns a kept output."""

    def forward(self, x):
        return self.kept.detach()


def base(kind, x, D_in, D_out):
    linear = (Kept if kind == "added" else nn.Linear)(D_in, D_out, bias=False).to(x.dtype)
    linear.kept = torch.zeros(*x.shape[:-1], D_out, dtype=x.dtype)
    return linear.requires_grad_(False)


def step(run, module, x, dy):
    """A call: the forward, and the gradients of x and of all that trains."""
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(run(x), wanted, dy, allow_unused=True)


def contenders(kind, T, D_in, D_out, B, dtype, train=True):
    """{name: call}"""
    import peft
    from peft.tuners.poly.layer import Linear as Poly

    torch.manual_seed(0)
    x = torch.randn(B, T // B, D_in, dtype=dtype, requires_grad=True)
    dy = torch.randn(B, T // B, D_out, dtype=dtype)
    tasks = torch.arange(B) % TASKS
    config = peft.PolyConfig(r=R, n_tasks=TASKS, n_skills=E, init_weights=False)
    theirs = Poly(base(kind, x, D_in, D_out), "default", config).train(train)
    calls = {THEIRS: step(lambda x: theirs(x, task_ids=tasks), theirs, x, dy)}
    for (name, config), mixes in itertools.product(ours().items(), (True, False)):
        layer = LoraMoeLinear(base(kind, x, D_in, D_out), config).train(train)
        layer.lora_B.data.normal_()
        run = routed(layer, tasks if config.num_tasks else None, torch.ones(B, T // B), mixes)
        calls[name if mixes else f"{name}, per token"] = step(run, layer, x, dy)
    return calls


def ours():
    shared = {"num_experts": E, "r": R, "top_k": E, "shared_a": True}
    shared |= {"balance_coef": 0.0, "z_coef": 0.0}  # no auxiliary loss
    return {
        "ours, poly": presets.poly(TASKS, E, R),
        "ours, mtl_lora": presets.mtl_lora(TASKS, E, R),
        "ours, shared A, by task": LoraMoeConfig(router=TaskRouter(TASKS), **shared),
        "ours, shared A, by sequence": LoraMoeConfig(router=SequenceRouter("mean"), **shared),
    }


def routed(layer, tasks, mask, mixes):
    never = mock.patch.object(plan, "mixes", lambda *shape: False)

    def run(x):
        with use_routing(layer, task_ids=tasks, mask=mask):
            return layer(x)

    return run if mixes else never(run)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("added", "layer"))
    parser.add_argument("--eval", action="store_true", help="without Poly's noise of training")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(machine.describe())
    kinds = (args.only,) if args.only else ("added", "layer")
    for kind, shape, B in itertools.product(kinds, SHAPES, SAMPLES):
        for dtype in (torch.float32, torch.bfloat16):
            calls = contenders(kind, *shape, B, dtype, not args.eval)
            seconds = timing.interleave(calls, args.turns)
            T, D_in, D_out = shape
            print(f"\n{kind}: T={T} {D_in}x{D_out}, {B} samples, {str(dtype).split('.')[1]}")
            for name, of in seconds.items():
                median = timing.duration(statistics.median(of))
                print(f"  {name:<40}{median:>10}  {timing.ratio(seconds[THEIRS], of)}")


if __name__ == "__main__":
    main()
