"""BranchLoRA's ladder on seven tasks in a row, answered in words by a sentence encoder.

    python -m examples.branch_lora --out build/branch_lora

Each arm learns the tasks of examples/branch_lora_tasks.py one after the other and is asked, after
each of them, all that it has learned so far; nobody tells it which task an item belongs to.  Writes
OUT/runs.jsonl (a restart goes on from it), OUT/report.md and two pictures.  The protocol stands in
docs/branch_lora.md.
"""

import functools
import json
import statistics
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import lora_moe
from benchmarks import timing
from examples import evidence, figures, minilm
from examples.branch_lora_tasks import load_tasks
from examples.training import chunks, optimizer_of, rate_at
from lora_moe.methods import branch_lora as bl
from lora_moe.methods.continual import TaskSelector, continual_metrics

LINEARS = (
    r"encoder\.layer\.[345]\."  # the upper half: its [CLS] has read the sentence, and steps are quick
    r"(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
)
BRANCHES, RANK, TOP_K = 8, 8, 2
ALPHA = 2.0 * BRANCHES * RANK  # the paper's scaling, 2
TEMPERATURE = 0.05
STEPS, BATCH, ITEMS = 40, 16, 80  # a task's steps, items a step, held-out items a task

LEARNING_RATES = dict.fromkeys(
    (
        "lora",
        "moelora",
        "shared A",
        "sparse",
        "freezing",
        "BranchLoRA",
        "trunk held",
        "no freezing",
    ),
    1e-3,
)
LADDER = ("lora", "moelora", "shared A", "sparse", "freezing", "BranchLoRA")
ABLATIONS = ("trunk held", "no freezing")
BRANCHED = {  # arm -> reads, top_k, a router for each task, branches to freeze, trunk held
    "shared A": ("token", BRANCHES, False, 0, False),
    "sparse": ("first", TOP_K, False, 0, False),
    "freezing": ("first", TOP_K, False, TOP_K, False),
    "BranchLoRA": ("first", TOP_K, True, TOP_K, False),
    "trunk held": ("first", TOP_K, True, TOP_K, True),
    "no freezing": ("first", TOP_K, True, 0, False),
}


class Learner:
    """One arm: an encoder with adapters, and what happens to it before and after a task."""

    def __init__(self, arm):
        self.model, self.arm = minilm.load_model(), arm
        if arm in BRANCHED:
            self.reads, top_k, self.routers, self.freeze, self.held = BRANCHED[arm]
            config = bl.branch_lora(BRANCHES, RANK, top_k, ALPHA, target_modules=LINEARS)
            bl.inject(self.model, config, reads=self.reads)
            return
        experts = 1 if arm == "lora" else BRANCHES
        config = bl.moelora(experts, BRANCHES * RANK, ALPHA, target_modules=LINEARS)
        for layer in lora_moe.injected(lora_moe.inject(self.model, config)).values():
            layer.router_weight.requires_grad_(arm != "lora")  # one expert has nothing to choose

    def begin(self):
        if self.arm in BRANCHED:
            bl.begin_task(self.model, router=self.routers)
        self.model.train()

    def end(self):
        self.model.eval()
        if self.arm in BRANCHED:
            bl.end_task(self.model, self.freeze)
            for layer in bl.branch_layers(self.model).values():
                layer.lora_A.requires_grad_(not self.held)

    def choose(self, tasks):
        """The selector's choice, (B,); an arm with one router for all has nothing to choose."""
        if self.arm in BRANCHED:
            bl.set_task(self.model, tasks if self.routers else 0)

    def trained(self):
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


class Data:
    """What all arms of a seed share: tasks, tokens, answers by the untuned encoder, task keys."""

    def __init__(self, split, items, steps, tasks=None):
        self.split, self.items, self.steps = split, items, steps
        self.tasks = load_tasks()[:tasks]
        self.tokenizer, self.frozen = minilm.load_tokenizer(), minilm.load_model()
        self.answers = sorted({answer for task in self.tasks for answer in task.answers})
        self.targets = self.embed_frozen(self.answers)  # (answers, D)
        self.asked = [task.fixed(split, items) for task in self.tasks]

    def tokens(self, texts):
        return self.tokenizer(list(texts), return_tensors="pt", padding=True)

    @torch.no_grad()
    def embed_frozen(self, texts):
        return torch.cat([minilm.embed(self.frozen, self.tokens(c)) for c in chunks(texts, 32)])

    def loss(self, model, pairs):
        texts, answers = zip(*pairs)
        wanted = torch.tensor([self.answers.index(answer) for answer in answers])
        return cross_entropy(self.scores(model, texts), wanted)

    def scores(self, model, texts):
        return minilm.embed(model, self.tokens(texts)) @ self.targets.T / TEMPERATURE

    @functools.lru_cache(maxsize=1)
    def chosen(self, seed):
        """[after task i][of task j] -> (items,) tasks by the keys of the training texts so far."""
        selector, chosen = TaskSelector(self.targets.shape[1]), []
        queries = [self.embed_frozen([text for text, _ in asked]) for asked in self.asked]
        for i, task in enumerate(self.tasks):
            selector.begin_task()
            for batch in task.batches(self.steps, BATCH, seed):
                selector.observe(self.embed_frozen([text for text, _ in batch]))
            chosen.append([selector(query) for query in queries[: i + 1]])
        return chosen


def run(data, arm, seed):
    """Learn the tasks in a row; right[i][j] says which items of task j are right after task i."""
    torch.manual_seed(seed)
    learner, chosen = Learner(arm), data.chosen(seed)
    found = {"right": [], "oracle": [], "selected": [], "trained": [], "loss": []}
    for i, task in enumerate(data.tasks):
        learner.begin()
        found["trained"].append(learner.trained())
        optimizer = optimizer_of(learner.model, LEARNING_RATES[arm])
        losses = []
        for step, batch in enumerate(task.batches(data.steps, BATCH, seed)):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATES[arm] * rate_at(step, data.steps)
            loss = data.loss(learner.model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        learner.end()
        found["loss"].append(statistics.mean(losses[-10:]))
        found["right"].append([ask(data, learner, j, chosen[i][j]) for j in range(i + 1)])
        found["selected"].append([(chosen[i][j] == j).tolist() for j in range(i + 1)])
    if arm in BRANCHED and learner.routers:  # what a perfect selector would give
        known = [torch.full((data.items,), j) for j in range(len(data.tasks))]
        found["oracle"] = [ask(data, learner, j, tasks) for j, tasks in enumerate(known)]
        found["frozen"] = [list(v.frozen) for v in bl.branch_layers(learner.model).values()]
    return found


@torch.no_grad()
def ask(data, learner, j, tasks):
    """Which items of task j are answered right, the answer being the nearest of all tasks'."""
    right = []
    for pairs, chosen in zip(chunks(data.asked[j], 40), tasks.split(40)):
        texts, answers = zip(*pairs)
        learner.choose(chosen)
        best = data.scores(learner.model, texts).argmax(1).tolist()
        right += [data.answers[b] == answer for b, answer in zip(best, answers)]
    return right


def by_item(right):
    """{metric: (tasks * items,)}, whose means are ACC, MAA and BWT."""
    n = len(right)
    table = [[np.asarray(row, dtype=float) for row in rows] for rows in right]
    acc = np.concatenate(table[-1])
    maa = [sum(table[i][j] / (i + 1) for i in range(j, n)) for j in range(n)]
    bwt = [table[-1][j] - table[j][j] for j in range(n - 1)]
    return {"ACC": acc, "MAA": np.concatenate(maa), "BWT": np.concatenate(bwt or [acc * 0])}
