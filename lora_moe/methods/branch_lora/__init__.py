"""BranchLoRA: continual instruction tuning with branches on a shared trunk (arXiv 2506.02041).

    y_i = W0 x_i + s * sum over j in topk(W_t x_*) of  g_j * B_j A x_i        for every token i of a sequence

A is the trunk, B_j the branches, W_t the router of task t.  A sequence decides once, by its token
x_*: the first that is not padding, or the mean of all that are not (or each token decides for itself).
While a task is learned, its routed weight is counted per branch; afterwards the k most used branches
are frozen, and their gradient is no longer computed.  Keys outside the model (TaskSelector) select the
router for a sequence without a task id.

    inject(model, branch_lora(...))
    for data in tasks:
        begin_task(model)             # a new router; make the optimizer after it
        train(model, data)
        end_task(model)               # freezes what the task came to rely on
    set_task(model, 2)                # or one task per sequence

The layers are LoraMoeLinear with shared_a and a PerTaskRouter, wrapped in a SequenceRouter if sequences
decide.  Everything in lora_moe works with them.

    config.py      branch_lora; moelora, the baseline, is the preset
    adapters.py    adds branches to a model; tasks and masks of a batch
    lifecycle.py   begin_task, end_task, add_branches
    counting.py    routed weight of the current task per branch
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
