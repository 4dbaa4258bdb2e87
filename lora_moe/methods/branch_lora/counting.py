"""Course, the task state that a model's layers share, and Count, which measures the use of branches.

Letters: B sequences, L tokens each, E branches, K picked ones.
"""

from __future__ import annotations

import torch

from ...context import thread
from ...forward_records import record_of
from ...layers import LoraMoeLinear
from ...recompute import recomputing


class Course:
    """A model's position in its sequence of tasks, shared by all of its layers.

    Attributes:
        route_by: "first", "mean" or "token": the router's input.
        modules_to_save: names of further modules that are trained.
        bank: bank[t] is the index of task t's router.
        learning: whether a task has begun and not ended.
        task: the task whose router is used: a number, or (B,) one per sequence; see set_task.
    """

    def __init__(self, route_by: str, modules_to_save: tuple[str, ...] = ()):
        self.route_by, self.modules_to_save = route_by, modules_to_save
        self.bank: list[int] = []
        self.learning = False
        self.task: int | torch.Tensor | None = None

    @property
    def counting(self) -> bool:
        """Whether the task being learned is used, not, for example, an earlier one in evaluation."""
        return self.learning and isinstance(self.task, int) and self.task == len(self.bank) - 1


class Count:
    """Forward hook that adds the current task's routed weight per branch to layer.usage.

    `usage` (E,) fp32 is a buffer of the layer, so that all DDP processes agree on it.
    """

    def __init__(self, course: Course):
        self.course = course

    @staticmethod
    def attach(layer: LoraMoeLinear, course: Course) -> None:
        usage = torch.zeros(layer.config.num_experts, device=layer.lora_A.device)
        layer.register_buffer("usage", usage)
        layer.register_forward_hook(Count(course))

    @staticmethod
    def of(module) -> Course | None:
        """The course of a layer with this hook, else None."""
        hooks = module._forward_hooks.values()
        return next((hook.course for hook in hooks if isinstance(hook, Count)), None)

    @torch.no_grad()
    def __call__(self, layer, args, _output):
        if torch.compiler.is_compiling() or not (layer.training and self.course.counting):
            return
        around = thread.decisions.get(layer)
        if recomputing() or (around and (around.disabled or around.tasks or around.routing)):
            return
        run, L = record_of(layer).last, 1
        ids, weights = run.routing.indices, run.routing.weights.detach()
        if self.course.route_by != "token":  # one decision for all tokens of a sequence
            L = args[0].shape[1]
        elif (counted := run.tokens.counted()) is not None:
            weights = weights * counted[:, None].to(weights.device)
        layer.usage = layer.usage.float()  # restore fp32 after .half()
        layer.usage.index_add_(0, ids[::L].flatten().long(), weights[::L].flatten().float())
