"""CoreMiddle: one core matrix per task between a shared A and the experts' B (MTL-LoRA)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .. import functional as F
from ..components import MAX_TASKS, TensorSpec, count, register
from ..middle import Middle
from ..per_sample import add_mixed, pays
from ..routing import Routing
from ..rows import adapter_rows, dense_gates


def identity(cores: torch.Tensor) -> None:
    """Fill (N, r, r) with identity matrices."""
    cores.copy_(torch.eye(cores.shape[-1], dtype=cores.dtype, device=cores.device))


@register
@dataclasses.dataclass(frozen=True)
class CoreMiddle(Middle):
    """y = base + sum_e g_e s_e B_e C_t A x  for task t;  C (num_tasks, r, r), initially the identity.

    Requires shared_a: the core has the rank of the shared A.  A token of task -1 uses no core and no expert.

    Args:
        num_tasks: N, in [1, 65536].
    Source: Yang et al. 2024 (MTL-LoRA), arXiv 2410.09437, its Lambda_t.
    """

    kind: ClassVar[str] = "core"
    num_tasks: int

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS)

    def tensors(self, config, D_in, D_out):
        if not config.shared_a:
            raise ValueError("shared_a: expected True with CoreMiddle, got False")
        r = config.ranks[0]
        return {"middle_core": TensorSpec((self.num_tasks, r, r), identity)}

    def mix(self, x, base, routing, tensors, batch):
        layer, samples = batch.layer, batch.samples
        if pays(layer, x, samples):
            tasks = batch.sample_tasks(x)
            if tasks is not None and len(tasks) == len(samples.indices):
                return self._mix_once(x, base, samples, tensors["middle_core"], tasks, layer)
        A, B = adapter_rows(layer)
        S, _ = F.shrink(x, A)  # (T, r)
        core = tensors["middle_core"].to(S)
        N, r, _ = core.shape
        tasks = Routing.from_ids(batch.tasks(x), num_experts=N)
        one = torch.eye(r, dtype=S.dtype, device=S.device).repeat(N, 1)  # (N r, r)
        S = F.grouped_lora(S, core.reshape(N * r, r), one, tasks, rank_offsets=r)  # C_t S
        E = batch.config.num_experts
        gates = (dense_gates(routing, E) * layer.scaling).to(S)  # (T, E)
        return F.expand((gates[:, :, None] * S[:, None]).flatten(1), B, base)

    def _mix_once(self, x, base, samples, core, tasks, layer):
        ids = samples.indices.masked_fill(tasks[:, None] < 0, -1)
        cores = core[tasks.clamp(min=0)]  # (B, r, r)
        return add_mixed(layer, x, base, samples._replace(indices=ids), cores)
