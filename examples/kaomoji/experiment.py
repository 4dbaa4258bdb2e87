"""C-LoRAE on kaomoji: do a universal expert and task experts beat one LoRA of the same size?

    python -m examples.kaomoji --tune           tunes each arm's rate, on validation items and another seed
    python -m examples.kaomoji                  evaluates all arms at their rates on the held-out items

SmolLM2-135M with a gated visual adapter reads a kaomoji, as a picture and as the text that can be read
aloud, and writes the set of its emotions, intents or subjects.  The lower layers are frozen and run only
once; the upper ones are adapted by five arms that differ only in their experts.  Protocol and results:
docs/kaomoji.md.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_moe
from examples.common import evidence
from examples.common.training import rate_at
from examples.kaomoji import report
from examples.kaomoji.arms import ARMS, TASKS
from examples.kaomoji.study import FULL, QUICK, Study, set_tasks
from examples.kaomoji.upper import upper
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import visual

RATES = Path(__file__).with_name("rates.json")
GRID, TUNING_SEEDS = (1e-3, 2e-3, 4e-3, 8e-3), [100]
VISUAL_RATE, GATE_RATE = 3e-3, 2e-2
MUTUAL_INFORMATION = 0.01  # coefficient
WARMUP, LAST = 10, 50  # steps of warmup; last steps whose mean loss is reported


def build(study, experts, seed):
    """The upper layers with experts, and a visual adapter that is initialized alike in all arms of a seed."""
    model = upper(study.upper, 0)
    inject = c_lorae.inject if isinstance(experts, c_lorae.CLoraeConfig) else lora_moe.inject
    torch.manual_seed(seed)
    inject(model, experts)
    torch.manual_seed(seed)
    blocks = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))
    return visual.add_visual(model, blocks, study.eye.width).train()


def optimizer_of(model, rate):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_gates = [p for name, p in named.items() if name.endswith("visual.gate")]
    of_visual = [p for name, p in named.items() if ".visual." in name and p.dim()]
    of_experts = [p for name, p in named.items() if ".visual." not in name]
    groups = [(of_experts, rate), (of_visual, VISUAL_RATE), (of_gates, GATE_RATE)]
    groups = [{"params": params, "lr": peak, "peak": peak} for params, peak in groups]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def losses_of(model, batch):
    """Mean cross entropy (B,) on each item's answer."""
    hidden, targets, shown, masks, tasks = batch
    set_tasks(model, tasks)
    visual.set_images(model, shown, masks)
    out = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    asked = targets >= 0
    each = F.cross_entropy(model.lm_head(out[asked]).float(), targets[asked], reduction="none")
    sums = each.new_zeros(len(targets)).index_add(0, asked.nonzero()[:, 0], each)
    return sums / asked.sum(1)


@sdpa_kernel(SDPBackend.MATH)  # faster than the flash kernel for a dozen tokens
def train(study, experts, rate, seed):
    """(trained model, record of the training)."""
    model = build(study, experts, seed)
    optimizer = optimizer_of(model, rate)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    trace = []
    for step, batch in enumerate(study.batches(seed)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_at(step, study.size.steps, WARMUP)
        losses = losses_of(model, batch)
        loss = losses.mean()
        if getattr(experts, "mutual_information", False):
            loss = loss + MUTUAL_INFORMATION * c_lorae.mutual_information_loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trace.append([losses[batch[-1] == t].mean().item() for t in range(len(TASKS))])
    return model.eval(), {
        "loss": dict(zip(TASKS, np.mean(trace[-LAST:], 0).tolist())),
        "experts": sum(p.numel() for p in optimizer.param_groups[0]["params"]),
    }


def score(study, name, rate, seed):
    """{"score": ...}, by which an arm's rate is chosen."""
    model, _ = train(study, ARMS[name], rate, seed)
    return {"score": study.f1(model, study.validation)}


def run(study, rates, name, seed):
    """Trains an arm; set F1 of each held-out item, and validation scores without pictures or experts."""
    started = time.process_time()
    model, found = train(study, ARMS[name], rates[name], seed)
    found |= {"rate": rates[name], "cpu": time.process_time() - started}
    found["heldout"] = study.scores(model, study.heldout)
    ask = partial(study.f1, model, study.validation)
    found["validation"] = ask()
    found["without pictures"] = ask(shown=False)
    if ARMS[name].num_tasks:
        found["without task experts"] = ask(expert=lambda t: -1)
        found["another task's expert"] = ask(expert=lambda t: (t + 1) % len(TASKS))
    return found


def main():
    parser = evidence.parser(__doc__, "build/kaomoji")
    parser.add_argument("--tune", action="store_true", help=f"only tune rates, into {RATES.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)  # before forking: each process uses one thread
    started = time.perf_counter()
    size, path, grid = FULL, RATES, GRID
    if args.quick:  # also tunes, but the rates stay in its folder
        size, path, grid, args.seeds = QUICK, args.out / RATES.name, GRID[:1], args.seeds[:1]
    if not (args.tune or args.quick or path.exists()):
        raise SystemExit("the rates are missing: python -m examples.kaomoji --tune")
    fast_bf16 = lora_moe.backend.cpu_isas()[0] == "avx512_bf16"
    study = Study(size, torch.bfloat16 if fast_bf16 else torch.float32)
    if args.tune or args.quick:
        of = partial(score, study)
        evidence.tune(
            args.out, path, ARMS, grid, TUNING_SEEDS, of, args.processes, setting=args.quick
        )
    if args.tune:
        print(evidence.tuning(path))
        return
    rates = evidence.rates(path)
    of, setting = partial(run, study, rates), {"quick": args.quick, "rates": rates}
    found = evidence.runs(args.out, ARMS, args.seeds, of, args.processes, setting=setting)
    report.write(args.out, study, args.seeds, found, path, started)
