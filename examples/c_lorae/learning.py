"""The arms of C-LoRAE's experiments (experts and loss), training on mixed batches, evaluation.

    y = W x + the arm's experts, in all linears of the adapted layers; R rank rows in all

All arms of a seed see the same batches.  Only arms with task experts are given an item's task; its text
names the task for all arms.
"""

import random
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn.functional import cross_entropy

import lora_moe
from examples.c_lorae.encoder import LINEARS
from examples.common.tasks import endless
from examples.common.training import optimizer_of, rate_at
from lora_moe import LoraMoeConfig
from lora_moe.methods import c_lorae

INFORMATION = 0.01  # coefficient of the mutual-information loss
ONE = "one LoRA"  # the baseline


@dataclass(frozen=True)
class Arm:
    config: c_lorae.CLoraeConfig | LoraMoeConfig
    negatives: str | None = None  # of the mutual-information loss; None: no such loss


def arms_of(num_tasks):
    """{name: Arm}, each with R = 8 N rank rows, except for the universal expert alone, which has 4 N."""
    rank = 4 * num_tasks
    ours = c_lorae.CLoraeConfig(
        num_tasks, r=rank, alpha=rank, mutual_information=True, target_modules=LINEARS
    )
    alone = c_lorae.CLoraeConfig(0, r=rank, alpha=rank, target_modules=LINEARS)
    silent = c_lorae.CLoraeConfig(num_tasks, r=rank, alpha=rank, target_modules=LINEARS)
    added = c_lorae.CLoraeConfig(
        num_tasks, rank, rank, gate="sum", mutual_information=True, target_modules=LINEARS
    )
    each = LoraMoeConfig(num_tasks, r=8, top_k=1, alpha=8, balance_coef=0, target_modules=LINEARS)
    return {
        ONE: Arm(ours.one_lora()),
        "universal only": Arm(alone),
        "one LoRA per task": Arm(each),
        "plain sum": Arm(added, "batch"),
        "C-LoRAE": Arm(ours, "batch"),
        "C-LoRAE, negatives within the task": Arm(ours, "task"),
        "C-LoRAE without mutual information": Arm(silent),
    }


class Learner:
    """The model of an arm, initialized from a seed."""

    def __init__(self, arm, encoder, seed):
        self.arm, self.encoder, self.model = arm, encoder, encoder.adaptable()
        torch.manual_seed(seed)
        if isinstance(arm.config, LoraMoeConfig):
            lora_moe.inject(self.model, arm.config)
            for layer in lora_moe.injected(self.model).values():
                layer.router_weight.requires_grad_(False)  # the task decides
        else:
            c_lorae.inject(self.model, arm.config)

    def scores(self, batch, tasks=None):
        """Scores of the answers (B, A); `tasks` overrides the batch's, -1 for only the universal expert."""
        tasks = batch.tasks if tasks is None else tasks
        if isinstance(self.arm.config, LoraMoeConfig):
            lora_moe.set_routing(self.model, task_ids=tasks)
        else:
            c_lorae.set_tasks(self.model, tasks)
        return self.encoder.scores(self.model, batch)

    def losses(self, batch):
        """Cross entropy of each item, (B,)."""
        return cross_entropy(self.scores(batch), batch.wanted, reduction="none")

    def information(self):
        """The arm's weighted mutual-information loss; 0 if it has none."""
        if self.arm.negatives is None:
            return 0.0
        loss = c_lorae.mutual_information_loss(self.model, negatives=self.arm.negatives)
        return INFORMATION * loss

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]


def per_item(losses, tasks):
    """The default loss: the mean over items."""
    return losses.mean()


def train(learner, items, batches, rate, weigh=per_item, watch=None):
    """Trains with AdamW on `batches` (lists of item indices); returns the learner.

    watch(learner, step, losses, tasks) is called before each update.
    """
    optimizer = optimizer_of(learner.model, rate)
    learner.model.train()
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, len(batches), warmup=20)
        batch = items.batch(rows)
        losses, information = learner.losses(batch), learner.information()
        if watch is not None:
            watch(learner, step, losses, batch.tasks)
        (weigh(losses, batch.tasks) + information).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    learner.model.eval()
    return learner


@torch.no_grad()
def right(learner, items, universal=False):
    """[bool]: which items are answered correctly; `universal` disables the task experts."""
    learner.model.eval()
    found = [None] * len(items)
    for rows, batch in items.all():
        tasks = torch.full_like(batch.tasks, -1) if universal else None
        for i, hit in zip(rows, learner.scores(batch, tasks).argmax(1) == batch.wanted):
            found[i] = bool(hit)
    return found


def by_task(values, tasks):
    """[N]: mean of the values (n,) for each task."""
    values = torch.as_tensor(values, dtype=torch.float32)
    return [float(values[tasks == task].mean()) for task in tasks.unique().tolist()]


def proportional(items, steps, size, seed):
    """`steps` lists of item indices, with every item equally likely."""
    order = drawn(range(len(items)), steps * size, f"proportional {seed}")
    return [order[i * size : (i + 1) * size] for i in range(steps)]


def balanced(items, steps, each, seed):
    """`steps` lists of item indices, `each` per task."""
    rng = random.Random(f"balanced {seed}")
    of_task = [(items.tasks == t).nonzero()[:, 0].tolist() for t in items.tasks.unique()]
    streams = [endless(rows, rng) for rows in of_task]
    return [[next(s) for s in streams for _ in range(each)] for _ in range(steps)]


def drawn(rows, count, seed):
    """`count` of the rows in random order; none repeats before all have been drawn."""
    return list(islice(endless(rows, random.Random(seed)), count))
