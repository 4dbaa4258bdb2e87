"""What an arm does before, in and after a task: one LoRA or MoELoRA, a LoRA per task, branches."""

import warnings
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

import lora_moe
from examples.common import minilm
from lora_moe.methods import branch_lora as bl
from lora_moe.routers import TaskRouter

LINEARS = r".*\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
BRANCHES, RANK, TOP_K, ALPHA = 8, 16, 2, 256.0  # the paper's
TOTAL = BRANCHES * RANK  # rank of every arm, all experts together
SCALE = ALPHA / TOTAL  # of every arm
TEMPERATURE = 0.05


def scores(hidden, mask, targets):
    """(B, A) cosines of the mean tokens and the answers of all tasks, over the temperature."""
    return minilm.pool(hidden, mask) @ targets.T / TEMPERATURE


class Learner:
    """Adapters that learn on, task after task, with nothing done about forgetting: MoELoRA's experts.

    One expert is one LoRA.
    """

    routes = False  # whether the selector's choice matters

    def __init__(self, model, targets, experts=1):
        self.model, self.targets = model, targets
        config = bl.moelora(experts, TOTAL, ALPHA, target_modules=LINEARS)
        for layer in lora_moe.injected(lora_moe.inject(model, config)).values():
            layer.router_weight.requires_grad_(experts > 1)  # one expert has nothing to choose

    def begin(self, batches):
        self.model.train()

    def loss(self, number, batch):
        """Of the task's batch `number`."""
        return cross_entropy(self.scores(batch), batch.wanted)

    def end(self, batches):
        self.model.eval()

    def choose(self, tasks):
        """Tasks (B,) of the items to be asked, numbered as they were learned."""

    def scores(self, batch):
        return scores(self.model(batch.hidden, batch.mask), batch.mask, self.targets)

    def trained(self):
        """Parameters that the task at hand trains."""
        held = sum(_held(layer) for layer in lora_moe.injected(self.model).values())
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) - held


def _held(layer):
    """Parameters of the frozen experts; a trunk is nobody's."""
    ranks = sum(layer.config.ranks[e] for e in layer.frozen)
    return ranks * (layer.out_features + (0 if layer.config.shared_a else layer.in_features))


class PerTask(Learner):
    """A LoRA of its own for each task, all of them together as large as the one; nothing is shared."""

    routes = True

    def __init__(self, model, targets, tasks):
        self.model, self.targets, self.task = model, targets, -1
        ranks = tuple(TOTAL // tasks + (t < TOTAL % tasks) for t in range(tasks))
        config = lora_moe.LoraMoeConfig(
            tasks, ranks, 1, tuple(SCALE * r for r in ranks), target_modules=LINEARS,
            router=TaskRouter(tasks, "expert"),
        )  # fmt: skip
        lora_moe.inject(model, config)

    def begin(self, batches):
        super().begin(batches)
        self.task += 1
        lora_moe.set_routing(self.model, task_ids=torch.tensor(self.task))
        for layer in lora_moe.injected(self.model).values():
            layer.frozen = set(range(layer.config.num_experts)) - {self.task}

    def choose(self, tasks):
        lora_moe.set_routing(self.model, task_ids=tasks)


@dataclass(frozen=True)
class Rung:
    """What an arm takes of BranchLoRA."""

    route_by: str = "first"
    top_k: int = TOP_K
    routers: bool = True  # one per task, and the selector to pick it
    freeze: int = TOP_K
    trunk_held: bool = False  # A trains in the first task only
    grows: bool = False  # by top_k branches once a layer has fewer than that to train


class Branched(Learner):
    """BranchLoRA, or what `rung` takes of it."""

    def __init__(self, model, targets, rung):
        self.model, self.targets, self.rung, self.routes = model, targets, rung, rung.routers
        config = bl.branch_lora(BRANCHES, RANK, rung.top_k, ALPHA, target_modules=LINEARS)
        bl.inject(model, config, route_by=rung.route_by)

    def begin(self, batches):
        super().begin(batches)
        layers = bl.branch_layers(self.model).values()
        if self.rung.grows and any(v.config.num_experts - len(v.frozen) < TOP_K for v in layers):
            bl.add_branches(self.model, TOP_K)
        with warnings.catch_warnings():  # an arm that does not grow may run out of branches
            warnings.simplefilter("ignore")
            bl.begin_task(self.model, router=self.rung.routers)

    def end(self, batches):
        super().end(batches)
        bl.end_task(self.model, self.rung.freeze)
        for layer in bl.branch_layers(self.model).values():
            layer.lora_A.requires_grad_(not self.rung.trunk_held)

    def choose(self, tasks):
        bl.set_task(self.model, tasks if self.rung.routers else 0)
