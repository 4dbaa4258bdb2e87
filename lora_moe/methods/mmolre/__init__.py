"""MMoLRE, multimodal mixture of low-rank experts, for tasks that share their inputs (arXiv 2505.14143).

    f_n(X)_i = B_n phi(A_n [x_{i-1}; x_i; x_{i+1}] + b1_n) + b2_n        a low-rank expert, Conv3 then Conv1
    H^t = sum_n g^t_n f_n(X^t) + g^t_{N+1} f_t(X^t)                      a UniTSE block, per task t
    features -> blocks, one stack per modality -> attention over modalities, one per task -> heads

All experts and routers of a block read X in one shrink, and their outputs come from one expand whose last
rows are the biases:  Y = [g phi(S + b1) | g] [B; b2].  A convolution is linear, so its three taps are added
in rank space, where a row has R instead of 3 D numbers.

Public information about the paper does not confirm these choices, some of which are options: phi = ReLU,
softmax over the N + 1 experts at each position, no residual, attention pooling in the fusion, two-layer
heads.

Letters: B items, L positions, D width, N shared experts, E experts of all tasks together, R rank rows
of all experts, S streams: 1 if all tasks read the same input, or one per task.

    config.py    MMoLREConfig and Task
    block.py     UniTSE, the experts and routers of all tasks
    model.py     MMoLRE: streams, fusion, heads
    losses.py    one loss per kind of task
    files.py     saving and loading
    affect.py    sentiment and emotion metrics
"""

from .block import UniTSE
from .config import MMoLREConfig, Task
from .files import load, save
from .losses import task_losses, total_loss
from .model import Fusion, MMoLRE

__all__ = [
    "Fusion",
    "MMoLRE",
    "MMoLREConfig",
    "Task",
    "UniTSE",
    "load",
    "save",
    "task_losses",
    "total_loss",
]
