"""BranchLoRA's ladder on seven tasks in a row, answered in words by a sentence encoder.

    python -m examples.branch_lora --out build/branch_lora

Each arm learns the tasks of examples/branch_lora/tasks.py one after the other and is asked, after
each of them, all that it has learned so far; nobody tells it which task an item belongs to.  Writes
OUT/runs.jsonl (a restart goes on from it), OUT/report.md and two pictures.  The protocol stands in
docs/branch_lora.md.
"""

import functools
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

import lora_moe
from benchmarks import timing
from examples.branch_lora import report
from examples.branch_lora.tasks import SOURCES, load_tasks
from examples.common import evidence, minilm
from examples.common.training import chunks, optimizer_of, rate_at
from lora_moe.methods import branch_lora as bl
from lora_moe.methods.branch_lora.continual import TaskSelector

LINEARS = r".*\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
FIRST = 4  # layer with experts: its [CLS] has read the sentence; what lies below is computed once
BRANCHES, RANK, TOP_K, ALPHA = 8, 16, 2, 256.0  # the paper's
TEMPERATURE = 0.05
STEPS, BATCH, ITEMS = 40, 16, 80  # a task's steps, items a step, held-out items a task

LADDER = ("lora", "moelora", "shared A", "sparse", "freezing", "BranchLoRA")
ABLATIONS = ("no freezing", "trunk held", "growing")
LEARNING_RATES = dict.fromkeys([*LADDER, *ABLATIONS], 1e-3)  # by validation, see the protocol
LEARNING_RATES |= {"lora": 3e-4, "moelora": 1e-4, "freezing": 3e-4}
AGAIN = {"moelora at 3e-4": 3e-4, "moelora at 1e-3": 1e-3, "freezing at 1e-3": 1e-3}
LEARNING_RATES |= AGAIN  # at the other rates tried, lest a rate be taken for a method


@dataclass(frozen=True)
class Rung:
    """What an arm takes of BranchLoRA."""

    reads: str = "first"
    top_k: int = TOP_K
    routers: bool = True  # one per task, and the selector to pick it
    freeze: int = TOP_K
    trunk_held: bool = False  # A trains in the first task only
    grows: bool = False  # by top_k branches once a layer has fewer than that to train


BRANCHED = {
    "shared A": Rung("token", BRANCHES, routers=False, freeze=0),
    "sparse": Rung(routers=False, freeze=0),
    "freezing": Rung(routers=False),
    "BranchLoRA": Rung(),
    "no freezing": Rung(freeze=0),
    "trunk held": Rung(trunk_held=True),
    "growing": Rung(grows=True),
}


class Learner:
    """One arm: an encoder with adapters, and what happens to it before and after a task."""

    def __init__(self, arm, model):
        arm = arm.partition(" at ")[0]
        self.model, self.rung = model, BRANCHED.get(arm)
        if self.rung:
            config = bl.branch_lora(BRANCHES, RANK, self.rung.top_k, ALPHA, target_modules=LINEARS)
            bl.inject(self.model, config, reads=self.rung.reads)
            return
        experts = 1 if arm == "lora" else BRANCHES
        config = bl.moelora(experts, BRANCHES * RANK, ALPHA, target_modules=LINEARS)
        for layer in lora_moe.injected(lora_moe.inject(self.model, config)).values():
            layer.router_weight.requires_grad_(arm != "lora")  # one expert has nothing to choose

    def begin(self):
        self.model.train()
        if not self.rung:
            return
        layers = bl.branch_layers(self.model).values()
        if self.rung.grows and any(v.config.num_experts - len(v.frozen) < TOP_K for v in layers):
            bl.add_branches(self.model, TOP_K)
        with warnings.catch_warnings():  # an arm that does not grow may run out of branches
            warnings.simplefilter("ignore")
            bl.begin_task(self.model, router=self.rung.routers)

    def end(self):
        self.model.eval()
        if self.rung:
            bl.end_task(self.model, self.rung.freeze)
            for layer in bl.branch_layers(self.model).values():
                layer.lora_A.requires_grad_(not self.rung.trunk_held)

    def choose(self, tasks):
        """The selector's choice, (B,); an arm with one router for all has nothing to choose."""
        if self.rung:
            bl.set_task(self.model, tasks if self.rung.routers else 0)

    def trained(self):
        held = sum(
            len(layer.frozen) * layer.config.ranks[0] * layer.out_features
            for layer in lora_moe.injected(self.model).values()
        )
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) - held


class Batch(NamedTuple):
    hidden: torch.Tensor  # (B, L, D), below the first layer with experts
    mask: torch.Tensor  # (B, L)
    wanted: torch.Tensor  # (B,), ids of the answers
    frozen: torch.Tensor  # (B, D), embeddings by the untuned encoder


class Data:
    """What all arms of a seed share: batches, answers by the untuned encoder, the selector's choice."""

    def __init__(self, split, items, steps, tasks=None):
        self.split, self.items, self.steps = split, items, steps
        self.tasks = load_tasks()[:tasks]
        self.tokenizer, self.untuned = minilm.load_tokenizer(), minilm.load_model()
        self.answers = sorted({answer for task in self.tasks for answer in task.answers})
        self.targets = self.encode([(answer, answer) for answer in self.answers]).frozen  # (A, D)
        asked = [chunks(task.fixed(split, items), 40) for task in self.tasks]
        self.asked = [[self.encode(pairs) for pairs in task] for task in asked]

    def tokens(self, pairs):
        return self.tokenizer([text for text, _ in pairs], return_tensors="pt", padding=True)

    def wanted(self, pairs):
        return torch.tensor([self.answers.index(answer) for _, answer in pairs])

    @torch.no_grad()
    def encode(self, pairs):
        tokens = self.tokens(pairs)
        hidden = self.untuned(**tokens, output_hidden_states=True).hidden_states
        mask = tokens["attention_mask"]
        return Batch(hidden[FIRST], mask, self.wanted(pairs), minilm.pool(hidden[-1], mask))

    def scores(self, hidden, mask):
        """Cosines to all tasks' answers, over the temperature."""
        return minilm.pool(hidden, mask) @ self.targets.T / TEMPERATURE

    @functools.lru_cache(maxsize=1)  # noqa: B019  one Data a process; all arms of a seed ask in turn
    def drawn(self, seed):
        """The training batches of each task, and chosen[i][j]: tasks that the selector, having seen

        the training texts of tasks 0 to i, gives the held-out items of task j.
        """
        batches = [
            [self.encode(pairs) for pairs in task.batches(self.steps, BATCH, seed)]
            for task in self.tasks
        ]
        selector, chosen = TaskSelector(self.targets.shape[1]), []
        for i, task in enumerate(batches):
            selector.begin_task()
            for batch in task:
                selector.observe(batch.frozen)
            chosen.append([[selector(b.frozen) for b in asked] for asked in self.asked[: i + 1]])
        return batches, chosen


def run(data, arm, seed):
    """Learn the tasks in a row; right[i][j] says which items of task j are right after task i."""
    torch.manual_seed(seed)
    learner = Learner(arm, minilm.Upper(minilm.load_model(), FIRST))
    batches, chosen = data.drawn(seed)
    found = {"right": [], "oracle": [], "selected": [], "trained": [], "loss": []}
    for i in range(len(data.tasks)):
        learner.begin()
        found["trained"].append(learner.trained())
        optimizer = optimizer_of(learner.model, LEARNING_RATES[arm])
        losses = []
        for number, batch in enumerate(batches[i]):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATES[arm] * rate_at(number, data.steps)
            scores = data.scores(learner.model(batch.hidden, batch.mask), batch.mask)
            losses.append(update(optimizer, cross_entropy(scores, batch.wanted)))
        learner.end()
        found["loss"].append(statistics.mean(losses[-10:]))
        found["right"].append([ask(data, learner, j, chosen[i][j]) for j in range(i + 1)])
        selected = [(torch.cat(tasks) == j).tolist() for j, tasks in enumerate(chosen[i])]
        found["selected"].append(selected)
    if learner.rung and learner.rung.routers:  # what a perfect selector would give
        known = [[torch.full_like(c, j) for c in tasks] for j, tasks in enumerate(chosen[-1])]
        found["oracle"] = [ask(data, learner, j, tasks) for j, tasks in enumerate(known)]
        found["frozen"] = [list(v.frozen) for v in bl.branch_layers(learner.model).values()]
    return found


def update(optimizer, loss):
    """Backward, step; returns the loss."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.no_grad()
def ask(data, learner, j, chosen):
    """Which items of task j are answered right, the answer being the nearest of all tasks'."""
    right = []
    for batch, tasks in zip(data.asked[j], chosen):
        learner.choose(tasks)
        scores = data.scores(learner.model(batch.hidden, batch.mask), batch.mask)
        right += (scores.argmax(1) == batch.wanted).tolist()
    return right


def step_times(data, rounds, size):
    """{arm: seconds of a training step}, in turns on the same texts: the whole encoder, experts in

    all of its linears; `after` all tasks but the last.
    """
    texts = next(data.tasks[0].batches(1, size, 0))
    tokens, wanted = data.tokens(texts), data.wanted(texts)
    mask = tokens["attention_mask"]

    def loss_of(model):
        return cross_entropy(data.scores(model(**tokens).last_hidden_state, mask), wanted)

    def step(model, optimizer):
        update(optimizer, loss_of(model))

    steps = {}
    before = {"lora": 0, "moelora": 0, "BranchLoRA": 0, "BranchLoRA, after": len(data.tasks) - 1}
    for name, tasks in before.items():
        torch.manual_seed(0)
        learner = Learner(name.partition(",")[0], minilm.load_model())
        for _ in range(tasks):
            learner.begin()
            loss_of(learner.model)  # some branches are used
            learner.end()
        learner.begin()
        steps[name] = functools.partial(step, learner.model, optimizer_of(learner.model, 1e-3))
    return timing.interleave(steps, rounds, timing.once)


def main():
    parser = evidence.parser(__doc__, "build/branch_lora")
    parser.add_argument("--times", action="store_true", help="measure the step times, nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    arms = [*LADDER, *ABLATIONS, *AGAIN]
    if args.quick:
        arms, args.seeds = ["moelora", "BranchLoRA"], args.seeds[:1]
        data = Data("test", 8, 2, tasks=3)
    else:
        data = Data("test", ITEMS, STEPS)
    times = args.out / "times.json"
    if args.times or not times.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        rounds, size = (2, 4) if args.quick else (15, 32)
        times.write_text(json.dumps(step_times(data, rounds, size)))
    if args.times:
        print(report.times(json.loads(times.read_text())))
        return
    runs = evidence.runs(args.out, arms, args.seeds, functools.partial(run, data))
    text = report.markdown(data, runs, args.seeds, json.loads(times.read_text()))
    text += "\n\n" + evidence.setting(args.seeds, started)
    text += "\n\n" + "\n".join(f"- {source}" for source in SOURCES) + "\n"
    (args.out / "report.md").write_text(text)
    report.draw(args.out, data, runs, args.seeds)
    print(text)
