"""C-LoRAE on kaomoji: does a universal expert with task experts beat one LoRA of the same size?

    python -m examples.c_lorae --out build/c_lorae

SmolLM2-135M with a gated visual adapter reads a kaomoji, as a picture and as what can be read aloud of
it, and writes the set of its emotions, intents or subjects.  The lower layers stay as they are and run
once; the upper ones are adapted, by five arms that differ in the experts and the loss only.  Protocol and
results: docs/c_lorae.md.
"""

import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import lora_moe
from examples.c_lorae import report as c_lorae_report
from examples.c_lorae import upper as parts
from examples.c_lorae.arms import ARMS, TASKS
from examples.c_lorae.study import FULL, QUICK, Study
from examples.common import evidence
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import visual
from lora_moe.methods.c_lorae.achievement import AchievementLoss

VISUAL_RATE, GATE_RATE = 3e-3, 2e-2


def prepare(study, config, seed):
    """The upper layers with a visual adapter, the same for all arms of a seed, and experts."""
    model = parts.upper(study.upper, 0)
    blocks = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))
    torch.manual_seed(seed)
    visual.add_visual(model, blocks, study.eye.width)
    torch.manual_seed(seed)
    c_lorae.inject(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def optimizer_of(model, rate):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_gates = [p for name, p in named.items() if name.endswith("visual.gate")]
    of_visual = [p for name, p in named.items() if ".visual." in name and p.dim()]
    of_experts = [p for name, p in named.items() if ".visual." not in name]
    groups = [(of_experts, rate), (of_visual, VISUAL_RATE), (of_gates, GATE_RATE)]
    groups = [{"params": params, "lr": rate, "peak": rate} for params, rate in groups]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def losses_of(model, batch, counts):
    """{task: mean cross entropy on its answers}."""
    hidden, targets, pictures, masks, tasks = batch
    c_lorae.set_tasks(model, tasks)
    visual.set_images(model, pictures, masks)
    out = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    asked = targets >= 0
    each = F.cross_entropy(model.lm_head(out[asked]).float(), targets[asked], reduction="none")
    of_task = tasks[:, None].expand_as(targets)[asked]
    return {TASKS[t]: each[of_task == t].mean() for t, n in enumerate(counts) if n}


def train(study, arm, seed, counts, achievement=None):
    """A trained model, and what happened; `achievement`: an AchievementLoss, else equal weights."""
    model, steps = prepare(study, arm.experts, seed), study.size.steps
    optimizer = optimizer_of(model, arm.rate)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    every = max(1, steps // (study.size.evaluations + 1))
    trace, weights = [], []
    for step, batch in enumerate(study.batches(seed, steps, counts)):
        if achievement is not None and step and step % every == 0:
            achievement.update(study.f1(model.eval(), study.validation))
            weights.append(achievement.weights().tolist())
            model.train()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / 10, 1.05 - step / steps)
        losses = losses_of(model, batch, counts)
        equal = torch.stack(list(losses.values())).mean()
        loss = equal if achievement is None else achievement(losses)
        if arm.mutual_information:
            loss = loss + arm.mutual_information * c_lorae.mutual_information_loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trace.append({name: value.item() for name, value in losses.items()})
    return model.eval(), {
        "loss": {name: float(np.mean([t[name] for t in trace[-20:]])) for name in trace[-1]},
        "weights": weights,
        "experts": sum(p.numel() for p in optimizer.param_groups[0]["params"]),
    }


def alone(study, name, seed):
    """The potential of a task: a plain LoRA trained on its items alone, as many as it gets elsewhere."""
    counts = [n if name.endswith(task) else 0 for n, task in zip(study.size.batch, TASKS)]
    model, found = train(study, ARMS["universal only"], seed, counts)
    return found | {"f1": study.f1(model, study.validation)}


def run(study, potentials, name, seed):
    """Trains an arm; its set F1 of each held-out item, and on the validation items what carries it."""
    arm, started = ARMS[name], time.process_time()
    achievement = AchievementLoss(potentials[seed]) if arm.achievement else None
    model, found = train(study, arm, seed, study.size.batch, achievement)
    found["cpu"] = time.process_time() - started
    found["heldout"] = study.scores(model, study.heldout)
    found["validation"] = study.f1(model, study.validation)
    found["without pictures"] = study.f1(model, study.validation, pictures=False)
    if arm.experts.num_tasks:
        found["without task experts"] = study.f1(model, study.validation, expert=lambda t: -1)
        found["another task's expert"] = study.f1(
            model, study.validation, expert=lambda t: (t + 1) % 3
        )
    return found


def main():
    args = evidence.parser(__doc__, "build/c_lorae").parse_args()
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    torch.set_num_threads(1)
    started = time.perf_counter()
    fast_bf16 = lora_moe.backend.cpu_isas()[0] == "avx512_bf16"
    study = Study(QUICK if args.quick else FULL, torch.bfloat16 if fast_bf16 else torch.float32)
    single = evidence.runs(
        args.out, [f"alone: {t}" for t in TASKS], args.seeds, partial(alone, study)
    )
    potentials = {
        seed: {t: max(single[f"alone: {t}", seed]["f1"][t], 0.01) for t in TASKS}
        for seed in args.seeds
    }
    found = evidence.runs(args.out, ARMS, args.seeds, partial(run, study, potentials))
    text = c_lorae_report.markdown(study, ARMS, args.seeds, found, potentials)
    text += "\n\n" + evidence.setting(args.seeds, started)
    text += f" Computed in {str(study.dtype).removeprefix('torch.')}.\n"
    (args.out / "report.md").write_text(text)
    c_lorae_report.draw(args.out, study, ARMS, args.seeds, found)
    print(text)
