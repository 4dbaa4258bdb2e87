"""The models of each arm of MMoLRE's example."""

from dataclasses import dataclass, replace

from torch import nn

from examples.mmolre import data
from examples.mmolre.kaomoji import EMOTIONS, SETS
from examples.mmolre.plain import plain
from lora_moe.methods.mmolre import MMoLRE, MMoLREConfig, Task

WIDTH, RANK, SHARED = 128, 8, 4
TASKS = {
    "sentiment": Task("mae"),
    "emotion": Task("multilabel", len(EMOTIONS)),
    **{name: Task("multilabel", len(labels)) for name, labels in SETS.items()},
}
FEATURES = {"text": data.TEXT, "image": data.IMAGE}
OURS = MMoLREConfig(
    modalities=FEATURES,
    tasks=TASKS,
    width=WIDTH,
    shared_ranks=(RANK,) * SHARED,
    task_rank=RANK,
    dropout=0.3,  # without it, intent and subject are overfitted within 300 steps
)
# as many experts, all shared; each task keeps its own streams and routers
ONLY_SHARED = replace(OURS, shared_ranks=(RANK,) * (SHARED + len(TASKS)), task_rank=0)
# three fewer fusions and three fewer routers, whose parameters go to the experts
HARD = replace(ONLY_SHARED, shared_ranks=(12,) * 4 + (11,) * 4, hard_sharing=True)
SMALL = replace(OURS, width=64, shared_ranks=(5,) * SHARED, task_rank=6)


@dataclass(frozen=True)
class Arm:
    """Models that are trained separately; together they cover all tasks."""

    models: tuple[MMoLREConfig, ...]
    one_fusion: bool = False  # all tasks read the same fused vector
    plain: bool = False  # blocks in plain PyTorch, which is faster at full rank


def with_rank(rank):
    """OURS with another rank for all experts."""
    return Arm((replace(OURS, shared_ranks=(rank,) * SHARED, task_rank=rank),))


def with_modality(name):
    return Arm((replace(OURS, modalities={name: FEATURES[name]}),))


def each_task(config):
    return Arm(tuple(replace(config, tasks={name: task}) for name, task in TASKS.items()))


ARMS = {
    "MMoLRE": Arm((OURS,)),
    "hard sharing": Arm((HARD,), one_fusion=True),
    "no task experts": Arm((ONLY_SHARED,)),
    "no task experts, one router": Arm((replace(ONLY_SHARED, hard_sharing=True),)),
    "one model per task, equal size": each_task(SMALL),
    "each task alone": each_task(OURS),
    "full-rank experts": replace(with_rank(WIDTH), plain=True),
    "MMoLRE, rank 2": with_rank(2),
    "MMoLRE, rank 32": with_rank(32),
    "text alone": with_modality("text"),
    "image alone": with_modality("image"),
}


def build(config, one_fusion=False, in_plain=False):
    """The model with linear heads; deep heads would hide the cost of sharing for a task."""
    model = plain(MMoLRE(config)) if in_plain else MMoLRE(config)
    for name, task in config.tasks.items():
        head = nn.Linear(config.width, task.outputs)
        model.heads[name] = nn.Sequential(nn.Dropout(config.dropout), head)
    if one_fusion:
        first = next(iter(model.fusion.values()))
        for name in config.tasks:
            model.fusion[name] = first
    return model


def parameters(module):
    return sum(p.numel() for p in module.parameters())
