"""BranchLoRA: continual instruction tuning with branches on a shared trunk (arXiv 2506.02041).

    y_i = W0 x_i + s * sum over j in topk(W_t x_*) of  g_j * B_j A x_i        for every token i of a sequence

A is the trunk, B_j are the branches, W_t is the router of task t.  Each sequence is routed once, by x_*:
its first token that is not padding, or the mean of these (or each token is routed separately).
During a task, its routed weight is counted per branch; afterwards the k most used branches are frozen,
and their gradient is no longer computed.  Keys outside the model (TaskSelector) select the router for
sequences without a task id.

    inject(model, branch_lora(...))
    for data in tasks:
        begin_task(model)             # adds a router; create the optimizer afterwards
        train(model, data)
        end_task(model)               # freezes the branches that the task used most
    set_task(model, 2)                # or one task per sequence

The layers are LoraMoeLinear with shared_a and a PerTaskRouter, which is in a SequenceRouter when routing
per sequence.  All functions of lora_moe support them.

    config.py      branch_lora; moelora, the baseline, is the preset
    adapters.py    adds branches to a model; tasks and masks of a batch
    lifecycle.py   begin_task, end_task, add_branches
    counting.py    counts the current task's routed weight per branch
    files.py       the complete state on disk
    continual.py   the task selector, ACC, MAA and BWT
"""

from ...presets.experts import moelora
from .adapters import branch_layers, branches_of, inject, routers_of, set_mask, set_task, state_of
from .config import branch_lora
from .continual import ContinualMetrics, TaskSelector, continual_metrics
from .files import FILE_NAME, load, save
from .lifecycle import add_branches, begin_task, end_task

__all__ = [
    "FILE_NAME",
    "ContinualMetrics",
    "TaskSelector",
    "add_branches",
    "begin_task",
    "branch_layers",
    "branch_lora",
    "branches_of",
    "continual_metrics",
    "end_task",
    "inject",
    "load",
    "moelora",
    "routers_of",
    "save",
    "set_mask",
    "set_task",
    "state_of",
]
