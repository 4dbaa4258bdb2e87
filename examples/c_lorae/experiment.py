"""C-LoRAE on kaomoji: does a universal expert with task experts beat one LoRA of the same size?

    python -m examples.c_lorae --out build/c_lorae

SmolLM2-135M with a gated visual adapter reads a kaomoji, as a picture and as what can be read aloud of
it, and writes the set of its emotions, intents or subjects.  The lower layers stay as they are and run
once; the upper ones are adapted, by five arms that differ in the experts and the loss only.  Protocol and
results: docs/c_lorae.md.
"""

import random
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import lora_moe
from examples.c_lorae import data as kaomoji_sets
from examples.c_lorae import report as c_lorae_report
from examples.c_lorae import upper as parts
from examples.common import evidence, smollm2
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import extraction, visual
from lora_moe.methods.c_lorae.achievement import AchievementLoss

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TASKS = tuple(kaomoji_sets.LABELS)
COLLABORATIVE = c_lorae.CLoraeConfig(
    num_tasks=3, r=24, alpha=24.0, mutual_information=True, target_modules=LINEARS
)
ONE = COLLABORATIVE.one_lora()


@dataclass(frozen=True)
class Arm:
    experts: c_lorae.CLoraeConfig
    rate: float  # of learning, for the experts
    mutual_information: float = 0.0  # coefficient
    achievement: bool = False


ARMS = {
    "universal only": Arm(replace(COLLABORATIVE, num_tasks=0, mutual_information=False), 2e-3),
    "one LoRA": Arm(ONE, 2e-3),
    "plain sum": Arm(replace(COLLABORATIVE, gate="sum"), 2e-3, 0.01),
    "C-LoRAE, equal weights": Arm(COLLABORATIVE, 2e-3, 0.01),
    "C-LoRAE": Arm(COLLABORATIVE, 2e-3, 0.01, achievement=True),
    # to explain: 24 + 8 rank rows act on a token in C-LoRAE, and s_t = 3 s_U there
    "one LoRA, active size": Arm(replace(ONE, r=32, alpha=32.0), 2e-3),
    "C-LoRAE, one scale": Arm(replace(COLLABORATIVE, task_alpha=8.0), 2e-3, 0.01),
}


@dataclass(frozen=True)
class Size:
    layers: int | None  # of the model; None: all
    adapted: int  # of them, the upper ones
    train: tuple[int, int, int]
    validation: int
    heldout: int
    batch: tuple[int, int, int]  # items of each task in a step
    steps: int
    evaluations: int  # of the achievement, during a run


FULL = Size(None, 6, (1500, 150, 1500), 60, 500, (15, 2, 15), 100, 3)
QUICK = Size(4, 2, (60, 12, 60), 6, 12, (6, 2, 6), 6, 2)
VISUAL_RATE, GATE_RATE = 3e-3, 2e-2
MAX_TEXT, MAX_ANSWER = 8, 10  # tokens


class Study:
    """Data, and what the lower layers made of it; the same for every arm and seed."""

    def __init__(self, size, dtype):
        self.size, self.tokenizer = size, smollm2.load_tokenizer()
        model = smollm2.load_model(size.layers).to(dtype)
        below = len(model.model.layers) - size.adapted
        self.lower, self.upper = parts.Lower(model, below), parts.upper(model, below)
        self.dtype = dtype
        self.tasks = kaomoji_sets.load(size.train, size.validation, size.heldout)
        self.eye = kaomoji_sets.Eye([item.drawing for task in self.tasks for item in task.train])
        self.train = [self._training(t, task.train) for t, task in enumerate(self.tasks)]
        self.validation = self._questions([task.validation for task in self.tasks])
        self.heldout = self._questions([task.heldout for task in self.tasks])

    def prompt(self, task, item):
        text = self.tokenizer.encode(item.text)[:MAX_TEXT]
        schema = kaomoji_sets.SCHEMAS[task]
        return self.tokenizer.encode(
            extraction.instruction(schema, self.tokenizer.decode(text), brief=True)
        )

    def _training(self, task, items):
        """[(hidden (L, D), targets (L,), picture (P, D_v), mask (P,))] of a task."""
        prompts = [self.prompt(task, item) for item in items]
        ends = [
            [*self.tokenizer.encode(" " + item.answer), self.tokenizer.eos_token_id]
            for item in items
        ]
        hidden = self.lower.hidden([p + e[:-1] for p, e in zip(prompts, ends)])
        targets = [torch.tensor([-100] * (len(p) - 1) + e) for p, e in zip(prompts, ends)]
        return list(zip(hidden, targets, *self.eye([item.drawing for item in items])))

    def _questions(self, items):
        """[(task, item)] of all tasks, and their Prompts."""
        asked = [(t, item) for t, of_task in enumerate(items) for item in of_task]
        return asked, self.lower.prompts([self.prompt(*question) for question in asked])

    def batches(self, seed, steps, counts):
        """(hidden (B, L, D), targets (B, L), pictures, mask, tasks (B,)) of each step."""
        rng = random.Random(seed)
        streams = [endless(items, rng) for items in self.train]
        for _ in range(steps):
            rows = [(next(streams[t]), t) for t, n in enumerate(counts) for _ in range(n)]
            hidden, targets, pictures, masks = zip(*(row for row, _ in rows))
            yield (
                torch.nn.utils.rnn.pad_sequence(hidden, True),
                torch.nn.utils.rnn.pad_sequence(targets, True, -100),
                torch.stack(pictures),
                torch.stack(masks),
                torch.tensor([t for _, t in rows]),
            )

    def answers(self, model, questions, pictures=True, expert=lambda t: t):
        """[(task, item, text)] of greedy generation.

        `pictures=False`: from the text alone; `expert`: which task's expert a task is given.
        """
        asked, prompts = questions
        said = [None] * len(asked)
        seen, masks = self.eye([item.drawing for _, item in asked])
        for group in prompts:
            c_lorae.set_tasks(model, torch.tensor([expert(asked[i][0]) for i in group.items]))
            shown = (seen[group.items], masks[group.items]) if pictures else (None,)
            visual.set_images(model, *shown)
            ids = parts.generate(self.lower, model, group, self.tokenizer.eos_token_id, MAX_ANSWER)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for i, text in zip(group.items, texts):
                said[i] = text.strip()
        return [(*question, text) for question, text in zip(asked, said)]

    def scores(self, model, questions, **how):
        """{task: [set F1 of each item]}"""
        found = {name: [] for name in TASKS}
        for task, item, text in self.answers(model, questions, **how):
            reading = extraction.read(kaomoji_sets.SCHEMAS[task], text)
            found[TASKS[task]].append(extraction.set_f1(reading, item.wanted))
        return found

    def f1(self, model, questions, **how):
        """{task: mean set F1}"""
        return {name: float(np.mean(s)) for name, s in self.scores(model, questions, **how).items()}


def endless(items, rng):
    while True:
        yield from rng.sample(items, len(items))


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
