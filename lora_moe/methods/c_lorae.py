"""C-LoRAE: collaborative multi-LoRA experts for generative multimodal information extraction.

    y_i = W0 x_i + g1(x_i) s_U B_U A_U x_i + g2(x_i) s_t B_t A_t x_i             t: the sample's task

One *universal* expert U of rank r sees every task, one *task* expert of rank r / N only its own.  A
gate, one for each linear, looks at the token and divides it between the two.  Expert 0 of the layer
is U and expert 1 + t is task t's, so a token has two slots and one call of F.grouped_lora runs both,
in any batch of tasks, without a loop over experts.

    mutual_information_loss   keeps universal and task experts from collapsing
    achievement.py            the loss that balances the tasks
    visual.py                 image features into the model
    extraction.py             instructions, answers and scores

Letters: T tokens, B samples, N tasks, R rank rows of all experts together, D_in and D_out the linear's
sizes.

Source: Collaborative Multi-LoRA Experts with Achievement-based Multi-Tasks Loss for Unified Multimodal
Information Extraction, IJCAI 2025, arXiv 2505.06303.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import nn

from .. import functional as F
from .. import records, safefile
from ..config import LoraMoeConfig
from ..context import recomputing
from ..inject import freeze_base, place
from ..layers import LoraMoeLinear
from ..routing import Routing
from ..targets import targets_of
from .visual import GatedVisual

GATES = ("softmax", "sigmoid", "sum")
FILE_NAME = "c_lorae.safetensors"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CLoraeConfig:
    """Every choice of a C-LoRAE model; a universal expert of rank r, N task experts of rank r // N.

    Args:
        num_tasks: N.  0 leaves the universal expert alone, an ordinary LoRA: the ablation.
        r: rank of the universal expert, at least N.
        alpha: an expert of rank r_e is scaled by s = alpha / r_e.
        task_alpha: the same of the task experts; None is alpha, so that s_t = N s_U.
        gate: "softmax" of two logits of the token; "sigmoid" of each; "sum", both weights 1: the
            ablation.  That there are two logits from x is inferred, the paper's text has not been
            compared.
        dropout: on the experts' input while training, never on the gate's; in [0, 1).
        mutual_information: keep what mutual_information_loss needs.
        target_modules, exclude_modules: as in LoraMoeConfig.
    Raises:
        ValueError: a field does not fit.
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
        if type(self.num_tasks) is not int or self.num_tasks < 0:
            raise ValueError(
                f"num_tasks: expected an integer of at least 0, got {self.num_tasks!r}"
            )
        if type(self.r) is not int or self.r < max(self.num_tasks, 1):
            raise ValueError(f"r: expected at least {max(self.num_tasks, 1)}, got {self.r!r}")
        if self.gate not in GATES:
            raise ValueError(f"gate: expected one of {GATES}, got {self.gate!r}")
        if not isinstance(self.mutual_information, bool) or (
            self.mutual_information and self.num_tasks == 0
        ):
            raise ValueError(
                "mutual_information: expected a bool, and task experts where it is True,"
                f" got {self.mutual_information!r} with {self.num_tasks} tasks"
            )
        _ = self.mixture, self.scales  # their constructors check the rest

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of the universal expert and of each task's, (1 + N,)."""
        return (
            (self.r, *[self.r // self.num_tasks] * self.num_tasks) if self.num_tasks else (self.r,)
        )

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each expert, (1 + N,)."""
        task = self.mixture if self.task_alpha is None else self._with_alpha(self.task_alpha)
        alphas = (self.alpha, *[task.alpha] * self.num_tasks)
        return tuple(alpha / r for alpha, r in zip(alphas, self.ranks, strict=True))

    @property
    def gated(self) -> bool:
        return self.num_tasks > 0 and self.gate != "sum"

    @property
    def mixture(self) -> LoraMoeConfig:
        """The same as experts of a LoraMoeLinear, but for task_alpha."""
        return self._with_alpha(self.alpha)

    def _with_alpha(self, alpha):
        return LoraMoeConfig(
            num_experts=1 + self.num_tasks,
            r=self.ranks,
            top_k=min(2, 1 + self.num_tasks),
            alpha=alpha,
            gate="sigmoid" if self.gate == "sigmoid" else "softmax",
            renormalize=False,
            dropout=self.dropout,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
        )

    def one_lora(self) -> CLoraeConfig:
        """The baseline: one LoRA with as many rank rows, and one more for the gate's parameters."""
        return dataclasses.replace(
            self,
            num_tasks=0,
            r=sum(self.ranks) + self.gated,
            alpha=self.alpha * (sum(self.ranks) + self.gated) / self.r,
            task_alpha=None,
            mutual_information=False,
        )


class CollaborativeLinear(LoraMoeLinear):
    """A drop-in for `base`: its own forward, the universal expert and the sample's task expert.

        y = base(x) + g1(x) s_U B_U A_U x + g2(x) s_t B_t A_t x

    Everything is as in LoraMoeLinear (parameters, initial values, dtypes, `routing`, `given`), except
    that router_weight, the gate, is (2, D_in), or None where there is nothing to gate, and that the
    tasks say which expert the second slot holds.

    Attributes:
        tasks: (B,) integers, -1 for no task expert; see set_tasks.
        pooled: (B, D_in), each sample's mean token of the last forward, for mutual_information_loss.
    """

    def __init__(self, base: nn.Module, config: CLoraeConfig):
        self.collaboration = config  # LoraMoeLinear's constructor asks for the scales
        super().__init__(base, config.mixture)
        self.tasks: torch.Tensor | None = None
        self.pooled: torch.Tensor | None = None
        # the normal rows of LoraMoeLinear's router, of which two are enough
        gate = self.router_weight[:2].detach().clone()
        self.router_weight = nn.Parameter(gate) if config.gated else None

    def sample_tasks(self, x: torch.Tensor) -> torch.Tensor:
        """(x.shape[0],): the task of each row of x."""
        if self.tasks is None:
            raise RuntimeError(
                "tasks: expected c_lorae.set_tasks(model, task_ids) before a forward"
            )
        have, rows = self.tasks.shape[0], x.shape[0]
        if rows % have if have else rows:
            raise ValueError(
                f"task_ids: expected one for each of the {rows} samples of x {tuple(x.shape)}, or for"
                f" each group of equally many beams, got {have}"
            )
        tasks = self.tasks.to(x.device)
        return tasks if have == rows else tasks.repeat_interleave(rows // have)

    def add_experts(self, x, base, given=None):
        if given is not None:
            return super().add_experts(x, base, given)
        routing = self._route(x)
        if self.config.dropout and self.training:
            x = nn.functional.dropout(x, self.config.dropout)
        return self._experts(x, routing, base), routing

    def _route(self, x):
        """Two slots a token: the universal expert and the task's, the heavier one first."""
        E, tokens = self.config.num_experts, x[..., 0].numel()
        if E == 1:
            return Routing.from_ids(
                torch.zeros(tokens, dtype=torch.int32, device=x.device), num_experts=1
            )
        tasks = self.sample_tasks(x)
        if self.collaboration.mutual_information and not recomputing():
            self.pooled = x.flatten(1, -2).mean(1) if x.dim() > 2 else x
        second = task_expert(tasks).repeat_interleave(tokens // max(len(tasks), 1))  # (T,)
        if self.router_weight is None:
            return Routing.from_ids(
                torch.stack([torch.zeros_like(second), second], 1), num_experts=E
            )
        gate = F.router_topk(x, self.router_weight, 2, gate=self.config.gate, renormalize=False)
        ids = torch.where(gate.indices == 0, 0, second[:, None])  # (T, 2)
        return Routing.from_ids(ids, gate.weights, num_experts=E)

    def _experts(self, x, routing, base=None):
        return F.grouped_lora(
            x,
            self.lora_A,
            self.lora_B,
            routing,
            rank_offsets=self.config.rank_offsets,
            scaling=self.scaling,
            base=base,
            frozen=self.frozen,
        )

    def representations(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """u, d (B, D_out): both experts' ungated outputs, mean over each sample's tokens; tasks (B,).

        An expert is linear, so the mean of its outputs is its output for the mean token: B rows of
        work instead of T.  d is zero where a sample has no task.
        """
        tasks = self.sample_tasks(self.pooled)
        ids = torch.cat([torch.zeros_like(tasks), task_expert(tasks)])
        routing = Routing.from_ids(ids, num_experts=self.config.num_experts)
        u, d = self._experts(torch.cat([self.pooled, self.pooled]), routing).chunk(2)
        return u, d, tasks

    @property
    def scales(self) -> tuple[float, ...]:
        return self.collaboration.scales

    def __getstate__(self):
        return super().__getstate__() | {"pooled": None}


def task_expert(tasks: torch.Tensor) -> torch.Tensor:
    """Expert id of a task's expert; -1 stays -1, no expert."""
    return torch.where(tasks < 0, tasks, tasks + 1)


def inject(model: nn.Module, config: CLoraeConfig, *, freeze: bool = True) -> nn.Module:
    """Replace the modules that config.target_modules names by CollaborativeLinear, in place.

    Args, Returns, Raises: as lora_moe.inject.  Parameters of the model's GatedVisual adapters stay
    trainable.
    """
    found = targets_of(model, config.mixture)
    place(model, {m: CollaborativeLinear(m, config) for m in dict.fromkeys(found.values())})
    if freeze:
        freeze_base(model)
        for adapter in modules_of(model, GatedVisual).values():
            adapter.requires_grad_(True)
    return model


def set_tasks(model: nn.Module, task_ids: torch.Tensor | None) -> None:
    """Say which task each sample of the following forwards has, until the next call.

    Kept on the layers, so that an activation checkpoint's recompute and every step of generate() see
    it, whatever the lengths of encoder and decoder.  With beams, one id serves its sample's beams.

    Args:
        model: with CollaborativeLinear modules.
        task_ids: (B,) integers in [-1, N), -1 for the universal expert alone; None forgets.
    Raises:
        ValueError, TypeError: no such modules, or no such ids.  Nothing changes then.
    """
    layers = modules_of(model, CollaborativeLinear)
    if not layers:
        raise ValueError(
            "model: expected one with CollaborativeLinear modules (see c_lorae.inject)"
        )
    if task_ids is not None:
        if task_ids.is_floating_point() or task_ids.dtype == torch.bool:
            raise TypeError(f"task_ids: expected integers, got {task_ids.dtype}")
        if task_ids.dim() != 1 or task_ids.shape[0] == 0:
            raise ValueError(f"task_ids: expected (B,), got {tuple(task_ids.shape)}")
    for layer in layers.values():
        layer.tasks = None if task_ids is None else task_ids.to(layer.lora_A.device)
        layer.pooled = None
        records.forget(layer)


def mutual_information_loss(model: nn.Module, temperature: float = 0.1) -> torch.Tensor:
    """Mean over layers of InfoNCE(u, d): lower means more information between the two experts' outputs.

        L = -mean_b log( exp(cos(u_b, d_b) / tau) / sum_c exp(cos(u_b, d_c) / tau) ),   I(u; d) >= log B - L

    u_b and d_b are a sample's universal and task representation (CollaborativeLinear.representations).
    Add it to the loss with a small coefficient: maximising the bound keeps the task expert speaking of
    the same samples as the universal one.  That C-LoRAE maximises a mutual information is known; this
    bound, the pooling (over all positions, padding too) and the temperature are inferred.

    Args:
        model: injected with mutual_information=True, after a forward.
        temperature: tau.
    Returns:
        0-dim, fp32 (fp64), differentiable.
    Raises:
        ValueError: no layer keeps what is needed.
        RuntimeError: no forward has run yet.
    Source of the bound: van den Oord et al. 2018 (CPC), arXiv 1807.03748, eq. 4-5.
    """
    layers = modules_of(model, CollaborativeLinear).values()
    layers = [layer for layer in layers if layer.collaboration.mutual_information]
    if not layers:
        raise ValueError("model: expected layers with mutual_information=True, got none")
    ran = [layer for layer in layers if layer.pooled is not None]
    if not ran:
        raise RuntimeError(
            "model: expected a forward to have run, but no layer holds its samples yet"
        )
    losses = [info_nce(*layer.representations(), temperature) for layer in ran]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def info_nce(u, d, tasks, temperature: float = 0.1) -> torch.Tensor:
    """-mean_b log softmax_c(cos(u_b, d_c) / tau)[b] over the samples with a task.  u, d (B, D), tasks (B,)"""
    idle = tasks < 0
    logits = (_unit(u) @ _unit(d).T / temperature).masked_fill(idle, -torch.inf)  # (B, B)
    own = torch.arange(len(u), device=u.device).masked_fill(idle, -100)
    return nn.functional.cross_entropy(logits, own, reduction="sum") / (~idle).sum().clamp(min=1)


def _unit(v):
    """v / sqrt(|v|^2 + eps): experts start at exactly 0, where a plain cosine has no gradient."""
    v = v if v.dtype == torch.float64 else v.float()
    return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + 1e-4)


def modules_of(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """{path: module} of the model's modules of a kind."""
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def save(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write experts, gates and visual adapters to directory/c_lorae.safetensors, all or nothing.

    Raises:
        ValueError: the model has none of them.
        OSError: the file cannot be written; an older one is intact.
    """
    tensors = {key: t.detach().contiguous() for key, t in _keyed(model).items()}
    path = safefile.path_in(directory, FILE_NAME)
    safefile.write(path, tensors, {"format": "pt", "c_lorae": json.dumps(_describe(model))})
    return path


@torch.no_grad()
def load(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Read what save wrote, into a model prepared in the same way (inject, add_visual).

    The model decides what the file must hold: paths, ranks, gates, shapes; it keeps its dtypes.

    Raises:
        ValueError: the file is damaged, is another's, does not fit the model (every misfit is listed) or
            holds NaN or infinite values.  The model is unchanged.
        OSError: the file cannot be read.
    """
    wanted, expected = _keyed(model), _describe(model)
    with safefile.open_in(directory, FILE_NAME) as file:
        metadata, slices = safefile.read_header(file)
        found = safefile.description(file, metadata, "c_lorae", FORMAT_VERSION)
        _expect_same(file.name, found, expected)
        values = safefile.read_tensors(file, slices, wanted)
    for key, tensor in wanted.items():
        tensor.copy_(values.pop(key))
    return model


def _trained(model):
    modules = modules_of(model, CollaborativeLinear) | modules_of(model, GatedVisual)
    if not modules:
        raise ValueError("model: expected CollaborativeLinear or GatedVisual modules, got none")
    return modules


def _keyed(model):
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in _trained(model).items()
        for name, tensor in module.adapter_state().items()
    }


def _describe(model):
    """What a saved file says of itself; JSON."""
    modules = {}
    for path, module in _trained(model).items():
        if isinstance(module, GatedVisual):
            modules[path] = {"visual": module.mode, "heads": module.heads}
        else:
            c = module.collaboration
            modules[path] = {"ranks": list(c.ranks), "scales": list(c.scales), "gate": c.gate}
    return {"version": FORMAT_VERSION, "modules": modules}


def _expect_same(name, found, expected):
    saved = found.get("modules")
    if not isinstance(saved, dict):
        raise ValueError(f"{name}: expected modules in its description")
    own = expected["modules"]
    problems = [
        f"{ascii(path)[:200]}: the model has {own.get(path)}, the file {brief(saved.get(path))}"
        for path in sorted(own.keys() | saved.keys())
        if own.get(path) != saved.get(path)
    ]
    if problems:
        raise ValueError(
            f"{name}: expected the modules of the model, got\n  " + "\n  ".join(problems)
        )
