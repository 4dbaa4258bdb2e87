"""The learners: one LoRA or MoELoRA, one LoRA per task, branches."""

import warnings
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

import lora_moe
from examples.common import minilm
from lora_moe.methods import branch_lora as bl
from lora_moe.routers import TaskRouter

LINEARS = r".*\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
BRANCHES, RANK, TOP_K, ALPHA = 8, 16, 2, 256.0  # as in the paper
TOTAL = BRANCHES * RANK  # rank of every arm, over all experts
SCALE = ALPHA / TOTAL  # of every arm
TEMPERATURE = 0.05


def scores(hidden, mask, targets):
    """Cosines (B, A) of the pooled tokens and the answers of all tasks, divided by the temperature."""
    return minilm.pool(hidden, mask) @ targets.T / TEMPERATURE


class Learner:
    """Trains the same adapters on task after task, without protection against forgetting.

    Several experts are MoELoRA; one expert is a LoRA.
    """

    routes = False  # whether the learner uses the selector's choice

    def __init__(self, model, targets, experts=1):
        self.model, self.targets = model, targets
        config = bl.moelora(experts, TOTAL, ALPHA, target_modules=LINEARS)
        for layer in lora_moe.injected(lora_moe.inject(model, config)).values():
            layer.router_weight.requires_grad_(experts > 1)  # one expert needs no router

    def begin(self, batches):
        self.model.train()

    def loss(self, number, batch):
        """Loss of the task's batch `number`."""
        return cross_entropy(self.scores(batch), batch.wanted)

    def end(self, batches):
        self.model.eval()

    def choose(self, tasks):
        """Sets the tasks (B,) of the next items, numbered in the order of learning."""

    def scores(self, batch):
        return scores(self.model(batch.hidden, batch.mask), batch.mask, self.targets)

    def trained(self):
        """Number of parameters that the current task trains."""
        held = sum(_held(layer) for layer in lora_moe.injected(self.model).values())
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) - held


def _held(layer):
    """Number of parameters of the frozen experts; a shared A belongs to none of them."""
    ranks = sum(layer.config.ranks[e] for e in layer.frozen)
    return ranks * (layer.out_features + (0 if layer.config.shared_a else layer.in_features))


class PerTask(Learner):
    """One LoRA per task, with nothing shared; together they have the rank of the single LoRA."""

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
    """The parts of BranchLoRA that an arm uses."""

    route_by: str = "first"
    top_k: int = TOP_K
    routers: bool = True  # one per task, chosen by the selector
    freeze: int = TOP_K
    trunk_held: bool = False  # A is trained only in the first task
    grows: bool = False  # adds top_k branches once a layer has fewer trainable ones


class Branched(Learner):
    """BranchLoRA, or the parts of it that `rung` uses."""

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
