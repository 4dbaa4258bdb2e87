"""CLoraeConfig: all options of a C-LoRAE model, and the corresponding LoraMoeConfig."""

from __future__ import annotations

import dataclasses

from ...components import one_of
from ...config import LoraMoeConfig
from ...fields import expect
from ...routers import UniversalRouter
from ...routers.universal import PAIR_GATES


@dataclasses.dataclass(frozen=True)
class CLoraeConfig:
    """All options of a C-LoRAE model: a universal expert of rank r, N task experts of rank r // N.

    Args:
        num_tasks: N.  0 means only the universal expert, a plain LoRA: the ablation.
        r: rank of the universal expert, at least N.
        alpha: an expert of rank r_e is scaled by s = alpha / r_e (inferred).
        task_alpha: the same for the task experts; None is alpha, so that s_t = N s_U.
        gate: "softmax" of two logits of the token; "sigmoid" of each; "sum", both weights 1: the
            ablation.  The two logits from x are inferred, not checked against the paper's text.
        dropout: on the experts' input in training, not on the gate's; in [0, 1).
        mutual_information: store what mutual_information_loss needs.
        target_modules, exclude_modules: as in LoraMoeConfig.
    Raises:
        ValueError: if a field is invalid.
    """

    num_tasks: int
    r: int = 24
    alpha: float = 24.0
    task_alpha: float | None = None
    gate: str = "softmax"
    dropout: float = 0.0
    mutual_information: bool = False
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()

    def __post_init__(self):
        N, r = self.num_tasks, self.r
        expect(type(N) is int and N >= 0, "num_tasks", "an integer of at least 0", N)
        expect(type(r) is int and r >= max(N, 1), "r", f"at least {max(N, 1)}", r)
        one_of("gate", self.gate, PAIR_GATES)
        if not isinstance(self.mutual_information, bool) or (
            self.mutual_information and self.num_tasks == 0
        ):
            raise ValueError(
                "mutual_information: expected a bool, and task experts if it is True,"
                f" got {self.mutual_information!r} with {self.num_tasks} tasks"
            )
        _ = self.mixture  # its constructor checks the rest

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the universal expert and of each task's expert, (1 + N,)."""
        return (self.r, *[self.r // max(self.num_tasks, 1)] * self.num_tasks)

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each expert, (1 + N,)."""
        return self.mixture.scales

    @property
    def gated(self) -> bool:
        return self.num_tasks > 0 and self.gate != "sum"

    @property
    def mixture(self) -> LoraMoeConfig:
        """The corresponding configuration for lora_moe.inject."""
        task = self.alpha if self.task_alpha is None else self.task_alpha
        return LoraMoeConfig(
            num_experts=1 + self.num_tasks,
            r=self.ranks,
            top_k=min(2, 1 + self.num_tasks),
            alpha=(self.alpha, *[task] * self.num_tasks),
            dropout=self.dropout,
            router=UniversalRouter(self.num_tasks, self.gate),
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            balance_coef=0.0,
            z_coef=0.0,
        )

    def one_lora(self) -> CLoraeConfig:
        """The baseline: one LoRA with the same total rank, plus 1 for the gate's parameters."""
        return dataclasses.replace(
            self,
            num_tasks=0,
            r=sum(self.ranks) + self.gated,
            alpha=self.alpha * (sum(self.ranks) + self.gated) / self.r,
            task_alpha=None,
            mutual_information=False,
        )
