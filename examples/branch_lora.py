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
import warnings
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

import lora_moe
from benchmarks import timing
from examples import branch_lora_report as report
from examples import evidence, minilm
from examples.branch_lora_tasks import load_tasks
from examples.training import chunks, optimizer_of, rate_at
from lora_moe.methods import branch_lora as bl
from lora_moe.methods.continual import TaskSelector

LINEARS = (
    r"encoder\.layer\.[345]\."  # the upper half: its [CLS] has read the sentence, and steps are quick
    r"(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
)
BRANCHES, RANK, TOP_K, ALPHA = 8, 16, 2, 256.0  # the paper's
TEMPERATURE = 0.05
STEPS, BATCH, ITEMS = 40, 16, 80  # a task's steps, items a step, held-out items a task
KEY_BATCHES = 10  # of each task, whose texts make its key

LADDER = ("lora", "moelora", "shared A", "sparse", "freezing", "BranchLoRA")
ABLATIONS = ("no freezing", "trunk held", "growing")
LEARNING_RATES = dict.fromkeys([*LADDER, *ABLATIONS], 1e-3)


@dataclass(frozen=True)
class Rung:
    """What an arm takes of BranchLoRA."""

    reads: str = "first"
    top_k: int = TOP_K
    routers: bool = True  # one a task, and the selector to pick it
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

    def __init__(self, arm):
        self.model, self.rung = minilm.load_model(), BRANCHED.get(arm)
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
        if self.rung.grows and any(len(v.branches) - len(v.frozen) < TOP_K for v in layers):
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

    @functools.lru_cache(maxsize=1)  # noqa: B019  one Data a process; all arms of a seed ask in turn
    def chosen(self, seed):
        """[after task i][of task j] -> (items,) tasks by the keys of the training texts so far."""
        selector, chosen = TaskSelector(self.targets.shape[1]), []
        queries = [self.embed_frozen([text for text, _ in asked]) for asked in self.asked]
        for i, task in enumerate(self.tasks):
            selector.begin_task()
            for batch in task.batches(KEY_BATCHES, BATCH, seed):
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
        for number, batch in enumerate(task.batches(data.steps, BATCH, seed)):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATES[arm] * rate_at(number, data.steps)
            losses.append(step(data, learner.model, optimizer, batch))
        learner.end()
        found["loss"].append(statistics.mean(losses[-10:]))
        found["right"].append([ask(data, learner, j, chosen[i][j]) for j in range(i + 1)])
        found["selected"].append([(chosen[i][j] == j).tolist() for j in range(i + 1)])
    if learner.rung and learner.rung.routers:  # what a perfect selector would give
        known = [torch.full((data.items,), j) for j in range(len(data.tasks))]
        found["oracle"] = [ask(data, learner, j, tasks) for j, tasks in enumerate(known)]
        found["frozen"] = [list(v.frozen) for v in bl.branch_layers(learner.model).values()]
    return found


def step(data, model, optimizer, pairs):
    """Forward, backward, update; returns the loss before the update."""
    loss = data.loss(model, pairs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


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


def step_times(data, rounds):
    """{arm: seconds of a training step}, in turns on the same batch; `after` all tasks but the last."""
    pairs = next(data.tasks[0].batches(1, BATCH, 0))
    learners = {"lora": 0, "moelora": 0, "BranchLoRA": 0, "BranchLoRA, after": len(data.tasks) - 1}
    steps = {}
    for name, before in learners.items():
        torch.manual_seed(0)
        learner = Learner(name.partition(",")[0])
        for task in data.tasks[:before]:
            learner.begin()
            data.loss(learner.model, next(task.batches(1, BATCH, 0)))  # some branches are used
            learner.end()
        learner.begin()
        steps[name] = functools.partial(
            step, data, learner.model, optimizer_of(learner.model, 1e-3), pairs
        )
    return timing.interleave(steps, rounds, timing.once)


def main():
    parser = evidence.parser(__doc__, "build/branch_lora")
    parser.add_argument("--times", action="store_true", help="measure the step times, nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    arms, data = [*LADDER, *ABLATIONS], None
    if args.quick:
        arms, args.seeds = ["moelora", "BranchLoRA"], args.seeds[:1]
        data = Data("test", 8, 2, tasks=3)
    else:
        data = Data("test", ITEMS, STEPS)
    times = args.out / "times.json"
    if args.times or not times.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        times.write_text(json.dumps(step_times(data, 2 if args.quick else 20)))
    if args.times:
        print(report.times(json.loads(times.read_text())))
        return
    runs = evidence.runs(args.out, arms, args.seeds, functools.partial(run, data))
    text = report.markdown(data, runs, args.seeds, json.loads(times.read_text()))
    text += "\n\n" + evidence.setting(args.seeds, started) + "\n"
    (args.out / "report.md").write_text(text)
    report.draw(args.out, data, runs, args.seeds)
    print(text)


if __name__ == "__main__":
    main()
