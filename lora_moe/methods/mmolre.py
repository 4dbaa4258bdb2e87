"""MMoLRE, multimodal mixture of low-rank experts, for tasks that share their inputs (arXiv 2505.14143).

    f_n(X)_i = B_n phi(A_n [x_{i-1}; x_i; x_{i+1}] + b1_n) + b2_n        a low-rank expert, Conv3 then Conv1
    H^t = sum_n g^t_n f_n(X^t) + g^t_{N+1} f_t(X^t)                      a UniTSE block, for each task t
    features -> blocks, one stack a modality -> attention over modalities, one a task -> heads

All experts of a block and the routers of all tasks read X in one shrink, and all leave it in one
expand whose last rows are the biases:  Y = [g phi(S + b1) | g] [B; b2].  A convolution is linear, so
its three taps are added in rank space, where a row has R numbers and not 3 D.

Not confirmed by what is public of the paper, hence options or choices of ours: phi = ReLU, softmax
over the N + 1 experts at each position, no residual, attention pooling in the fusion, two-layer heads.

Letters: B items, L positions, D width, N shared experts, E experts of all tasks together, R rank rows
of all experts, S streams: 1 where all tasks read the same input, or one a task.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import nn

from .. import functional as F
from .. import safefile
from ..config import MAX_COEFFICIENT, MAX_RANK

ACTIVATIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
ROUTES = ("token", "mean")
LOSSES = ("mae", "mse", "multiclass", "multilabel")
MAX_WIDTH = 65_536
MAX_PARTS = 64  # modalities, tasks, experts, blocks
ROUTER_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task's head puts out and how it is trained.

    Args:
        loss: "mae" or "mse" (regression), "multiclass" (cross-entropy of class ids) or "multilabel"
            (binary cross-entropy of each output).
        outputs: numbers an item: 1 for a sentiment score, the number of emotions.
        weight: of this loss in the sum; in [0, 1e6].
    """

    loss: str = "mae"
    outputs: int = 1
    weight: float = 1.0

    def __post_init__(self):
        _expect(self.loss in LOSSES, "loss", f"one of {LOSSES}", self.loss)
        _integer("outputs", self.outputs, 1, MAX_WIDTH)
        _number("weight", self.weight, MAX_COEFFICIENT)


@dataclasses.dataclass(frozen=True)
class MMoLREConfig:
    """Every choice of the model, checked before anything is allocated.

    Args:
        modalities: {name: features a position}, one or more, such as {"text": 768, "audio": 74}.
        tasks: {name: Task}.
        width: D, of the experts' inputs and outputs; other features are projected to it first.
        shared_ranks: rank of each shared expert; they may differ.
        task_rank: rank of each task's own expert in a block; 0 for none.
        blocks: UniTSE blocks of a modality, one upon the other.
        activation: phi, one of "relu", "gelu", "silu", "tanh".
        route: "token": gates at each position; "mean": one set of gates an item, from its mean.
        residual: add a block's input to its output.
        dropout: on the fused vector while training; in [0, 1).
        hard_sharing: the baseline: one stream for all tasks, so one router and no task's own experts
            (task_rank is 0); fusion and heads stay apart.
    Raises:
        ValueError: a field does not fit; the message names it, what was expected and was received.
    """

    modalities: Mapping[str, int]
    tasks: Mapping[str, Task]
    width: int = 768
    shared_ranks: tuple[int, ...] = (16, 16, 16, 16)
    task_rank: int = 16
    blocks: int = 2
    activation: str = "relu"
    route: str = "token"
    residual: bool = False
    dropout: float = 0.0
    hard_sharing: bool = False

    def __post_init__(self):
        for name in ("modalities", "tasks"):
            object.__setattr__(self, name, _named(name, getattr(self, name)))
        for name, features in self.modalities.items():
            _integer(f"modalities[{name!r}]", features, 1, MAX_WIDTH)
        for name, task in self.tasks.items():
            _expect(isinstance(task, Task), f"tasks[{name!r}]", "a Task", task)
        _integer("width", self.width, 1, MAX_WIDTH)
        ranks = self.shared_ranks
        many = isinstance(ranks, (list, tuple)) and 1 <= len(ranks) <= MAX_PARTS
        _expect(many, "shared_ranks", f"1 to {MAX_PARTS} ranks", ranks)
        for n, rank in enumerate(ranks):
            _integer(f"shared_ranks[{n}]", rank, 1, MAX_RANK)
        object.__setattr__(self, "shared_ranks", tuple(ranks))
        _integer("task_rank", self.task_rank, 0, MAX_RANK)
        _integer("blocks", self.blocks, 1, MAX_PARTS)
        _expect(
            self.activation in tuple(ACTIVATIONS),
            "activation",
            f"one of {[*ACTIVATIONS]}",
            self.activation,
        )
        _expect(self.route in ROUTES, "route", f"one of {ROUTES}", self.route)
        for name in ("residual", "hard_sharing"):
            _expect(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        _number("dropout", self.dropout, 1)
        _expect(self.dropout < 1, "dropout", "a probability in [0, 1)", self.dropout)
        own = self.hard_sharing and self.task_rank
        _expect(not own, "task_rank", "0 with hard_sharing, which has no task's own experts", own)

    def to_dict(self) -> dict:
        """Plain lists, strings and numbers; from_dict(config.to_dict()) == config."""
        return dataclasses.asdict(self) | {"shared_ranks": list(self.shared_ranks)}

    @classmethod
    def from_dict(cls, fields: dict) -> MMoLREConfig:
        """The inverse of to_dict; raises ValueError."""
        fields = _fields(cls, "config", fields)
        tasks = fields.get("tasks")
        if isinstance(tasks, dict):
            made = {name: Task(**_fields(Task, f"tasks[{name!r}]", t)) for name, t in tasks.items()}
            fields = fields | {"tasks": made}
        missing = [name for name in ("modalities", "tasks") if name not in fields]
        _expect(not missing, "config", "modalities and tasks", f"none of {missing}")
        return cls(**fields)


class UniTSE(nn.Module):
    """Shared and task-specific low-rank experts, mixed by one router a task.

        H^t = sum_n g^t_n f_n(X^t) + g^t_{N+1} f_t(X^t),    g^t = softmax(W^t x_i)
        f_n(X)_i = B_n phi(A_n [x_{i-1}; x_i; x_{i+1}] + b1_n) + b2_n

    Parameters: lora_A (3, R, D), one slice a tap: of x_{i-1}, x_i, x_{i+1}; bias_A (R,); lora_B (R, D),
    whose row r pairs with row r of lora_A; bias_B (E, D); router_weight (tasks * K, D), K the experts
    that a task chooses from.  Rows and experts are in the order: shared, then each task's own.
    There is no W0 beside the experts, so B does not start at zero: A and B are drawn such that the mean of
    K experts has their input's variance behind a ReLU; biases start at zero, routers near it.
    The attribute gates (tasks, B, L, E) is what the last forward mixed with, detached; None before.

    Args:
        width: D.
        shared_ranks: of the N shared experts.
        task_ranks: of each task's own expert, one a task; all zeros for tasks without one.
        activation, route, residual: as in MMoLREConfig.
    """

    def __init__(
        self,
        width: int,
        shared_ranks: tuple[int, ...],
        task_ranks: tuple[int, ...],
        *,
        activation: str = "relu",
        route: str = "token",
        residual: bool = False,
    ):
        super().__init__()
        mixed = any(task_ranks) and not all(task_ranks)
        _expect(
            len(task_ranks) and not mixed, "task_ranks", "one a task, all or none 0", task_ranks
        )
        _expect(
            activation in tuple(ACTIVATIONS), "activation", f"one of {[*ACTIVATIONS]}", activation
        )
        _expect(route in ROUTES, "route", f"one of {ROUTES}", route)
        self.width, self.tasks, self.shared = width, len(task_ranks), len(shared_ranks)
        self.activation, self.route, self.residual = activation, route, residual
        self.ranks = (*shared_ranks, *(r for r in task_ranks if r))
        self.choices = self.shared + bool(task_ranks[0])  # K
        R, E = sum(self.ranks), len(self.ranks)
        self.lora_A = nn.Parameter(torch.empty(3, R, width))
        self.bias_A = nn.Parameter(torch.empty(R))
        self.lora_B = nn.Parameter(torch.empty(R, width))
        self.bias_B = nn.Parameter(torch.empty(E, width))
        self.router_weight = nn.Parameter(torch.empty(self.tasks * self.choices, width))
        self.register_buffer("expert_of_row", self._expert_of_row(), persistent=False)  # (R,)
        self.gates: torch.Tensor | None = None
        self.reset_parameters()

    def _expert_of_row(self):
        experts = torch.arange(len(self.ranks))
        return experts.repeat_interleave(torch.tensor(self.ranks), output_size=sum(self.ranks))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values again (see the class)."""
        if self.lora_A.is_meta:
            return
        self.lora_A.uniform_(-1, 1).mul_(math.sqrt(2 / self.width))
        self.bias_A.zero_()
        for rows in self.lora_B.split(self.ranks):
            rows.uniform_(-1, 1).mul_(math.sqrt(3 * self.choices / len(rows)))
        self.bias_B.zero_()
        self.router_weight.normal_(std=ROUTER_STD)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """H of each task.

        Args:
            x: (B, L, D), the same for all tasks, or (tasks, B, L, D).
            mask: (B, L) bool, False at padding, which reads and becomes zero; None: no padding.
        Returns:
            (tasks, B, L, D) in x's dtype.
        Raises:
            ValueError: a shape does not fit.
        """
        x = self._streams(x, mask)  # (S, B, L, D)
        taps, logits = F.shrink(x, self.lora_A.flatten(0, 1), self.router_weight)
        s = conv3(taps.view(*x.shape[:-1], *self.lora_A.shape[:2]))  # (S, B, L, R)
        logits = logits.view(*x.shape[:-1], self.tasks, self.choices)
        gates = self._gates(logits, mask)  # (tasks, B, L, E)
        phi = ACTIVATIONS[self.activation](s + self.bias_A.to(s.dtype))
        h = phi * gates[..., self.expert_of_row]  # (tasks, B, L, R)
        base = x.expand(self.tasks, -1, -1, -1).contiguous() if self.residual else None
        rows = torch.cat([self.lora_B, self.bias_B]).to(x.dtype)  # (R + E, D)
        y = F.expand(torch.cat([h, gates], -1).flatten(0, -2), rows, base)
        y = y.view(self.tasks, *x.shape[1:])
        return y if mask is None else y.masked_fill(~mask[..., None], 0)

    def _streams(self, x, mask):
        expected = f"(B, L, {self.width}) or ({self.tasks}, B, L, {self.width})"
        fits = x.dim() in (3, 4) and x.shape[-1] == self.width
        fits = fits and (x.dim() == 3 or x.shape[0] == self.tasks)
        if not fits:
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")
        x = x if x.dim() == 4 else x[None]
        if mask is None:
            return x
        _expect_mask("mask", mask, x.shape[1:3])
        return x.masked_fill(~mask[..., None], 0)

    def _gates(self, logits, mask):
        """(S, B, L, tasks, K) -> (tasks, B, L, E): each task's softmax, zero for the others' experts."""
        logits = logits.expand(self.tasks, -1, -1, -1, -1).diagonal(dim1=0, dim2=3).movedim(-1, 0)
        if self.route == "mean":
            logits = masked_mean(logits, mask)[:, :, None].expand_as(logits)
        gates = logits.softmax(-1)  # (tasks, B, L, K)
        if self.choices > self.shared:
            own = torch.eye(self.tasks, dtype=gates.dtype, device=gates.device)[:, None, None]
            gates = torch.cat([gates[..., : self.shared], gates[..., self.shared :] * own], -1)
        self.gates = gates.detach()
        return gates

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, ranks={self.ranks}, shared={self.shared}, tasks={self.tasks},"
            f" activation={self.activation}, route={self.route}, residual={self.residual}"
        )


class Fusion(nn.Module):
    """Task-adaptive fusion: a task's own attention over positions, then over modalities.

        z_m = sum_i softmax_i(q_m . h_mi) h_mi        a = softmax_m(u . tanh(V z_m))        z = sum_m a_m z_m

    A modality whose mask holds no True for an item has no part in it; an item without any is zero.
    """

    def __init__(self, width: int, modalities: int):
        super().__init__()
        self.position_query = nn.Parameter(torch.zeros(modalities, width))
        self.project = nn.Linear(width, width)
        self.modality_query = nn.Linear(width, 1, bias=False)

    def forward(self, sequences, masks):
        """sequences: M of (B, L_m, D); masks: M of (B, L_m) bool or None.  -> (B, D)"""
        pooled, present = [], []
        for query, h, mask in zip(self.position_query, sequences, masks, strict=True):
            mask = h.new_ones(h.shape[:2], dtype=torch.bool) if mask is None else mask
            pooled.append(attend(h @ query.to(h.dtype), h, mask))
            present.append(mask.any(1))
        z, present = torch.stack(pooled, 1), torch.stack(present, 1)  # (B, M, D), (B, M)
        scores = self.modality_query(torch.tanh(self.project(z)))[..., 0]
        return attend(scores, z, present)


class MMoLRE(nn.Module):
    """Two or more feature sequences in, one prediction a task out.

    Each modality is projected to D and passes its own stack of UniTSE blocks: all tasks enter the first
    one together and leave it apart, and the shared experts of the later ones couple them again.  Then
    each task fuses the modalities and reads its head.
    """

    def __init__(self, config: MMoLREConfig):
        super().__init__()
        self.config = config
        D, tasks = config.width, 1 if config.hard_sharing else len(config.tasks)
        options = {name: getattr(config, name) for name in ("activation", "route", "residual")}
        ranks = config.shared_ranks, (config.task_rank,) * tasks
        self.project = nn.ModuleDict(
            {
                name: nn.Identity() if features == D else nn.Linear(features, D)
                for name, features in config.modalities.items()
            }
        )
        self.encoders = nn.ModuleDict(
            {
                name: nn.ModuleList(UniTSE(D, *ranks, **options) for _ in range(config.blocks))
                for name in config.modalities
            }
        )
        self.fusion = nn.ModuleDict(
            {name: Fusion(D, len(config.modalities)) for name in config.tasks}
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Dropout(config.dropout),
                    nn.Linear(D, D),
                    nn.ReLU(),
                    nn.Linear(D, task.outputs),
                )
                for name, task in config.tasks.items()
            }
        )

    def forward(
        self,
        features: Mapping[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """{task: (B, outputs)}: scores of a regression, logits of a classification.

        Args:
            features: {modality: (B, L, features)}; lengths may differ between modalities.
            masks: {modality: (B, L) bool}, False at padding; a modality left out has none.
        Raises:
            ValueError: a modality is missing or too many, or a shape does not fit.
        """
        masks = masks or {}
        self._check(features, masks)
        encoded = {}
        for name, blocks in self.encoders.items():
            mask, x = masks.get(name), features[name]
            if mask is not None:  # before the projection, whose gradient would meet a NaN there
                x = x.masked_fill(~mask[..., None], 0)
            h = self.project[name](x)
            for block in blocks:
                h = block(h, mask)
            encoded[name] = h  # (tasks or 1, B, L, D)
        masks = [masks.get(name) for name in encoded]
        outputs = {}
        for t, (task, head) in enumerate(self.heads.items()):
            stream = 0 if self.config.hard_sharing else t
            outputs[task] = head(self.fusion[task]([h[stream] for h in encoded.values()], masks))
        return outputs

    def _check(self, features, masks):
        known = self.config.modalities
        if features.keys() != known.keys() or not masks.keys() <= known.keys():
            got = f"features {sorted(features)}, masks {sorted(masks)}"
            raise ValueError(f"features: expected the modalities {sorted(known)}, got {got}")
        batch = next(iter(features.values())).shape[0]
        for name, x in features.items():
            if x.dim() != 3 or x.shape[0] != batch or x.shape[2] != known[name]:
                raise ValueError(
                    f"features[{name!r}]: expected ({batch}, L, {known[name]}), got {tuple(x.shape)}"
                )
            if masks.get(name) is not None:
                _expect_mask(f"masks[{name!r}]", masks[name], x.shape[:2])


def conv3(taps: torch.Tensor) -> torch.Tensor:
    """(..., L, 3, R) -> (..., L, R):  s_i = taps_{i-1, 0} + taps_{i, 1} + taps_{i+1, 2}, zero outside."""
    taps = nn.functional.pad(taps, (0, 0, 0, 0, 1, 1))
    return taps[..., :-2, 0, :] + taps[..., 1:-1, 1, :] + taps[..., 2:, 2, :]


def attend(scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_i softmax_i(scores) values_i over the True of the mask; zero where there are none.

    scores, mask (B, L), values (B, L, D) -> (B, D)
    """
    weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
    weights = weights.masked_fill(~mask, 0)  # an empty row's softmax is NaN
    return (weights[:, None] @ values)[:, 0]


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(S, B, L, K) -> (S, B, K), the mean over L where the mask (B, L) is True."""
    if mask is None:
        return x.mean(2)
    mask = mask[..., None].to(x.dtype)  # (B, L, 1)
    return (x * mask).sum(2) / mask.sum(1).clamp(min=1)


def task_losses(
    config: MMoLREConfig, outputs: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """{task: its mean loss}, unweighted; a label that is missing does not count.

    Args:
        outputs: the model's.
        labels: {task: tensor}: (B,) or (B, outputs) numbers, NaN where missing, for a regression; (B,)
            class ids, -100 where missing; (B, outputs) of 0 and 1, NaN where missing, for multilabel.
    """
    return {
        name: _loss(name, task.loss, outputs[name], labels[name])
        for name, task in config.tasks.items()
    }


def total_loss(config, outputs, labels) -> torch.Tensor:
    """sum over tasks of weight * loss; see task_losses."""
    losses = task_losses(config, outputs, labels)
    return sum(task.weight * losses[name] for name, task in config.tasks.items())


def save(model: MMoLRE, path: str | os.PathLike) -> None:
    """Write configuration and weights to one safetensors file, all or nothing.

    Args:
        path: of the file, not of a directory.
    Raises:
        ValueError: a parameter could not be read back, such as one on meta.
        OSError: the file cannot be written; an older one is as it was.
    """
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    safefile.write(
        Path(path), tensors, {"format": "pt", "mmolre": json.dumps(model.config.to_dict())}
    )


def load(path: str | os.PathLike) -> MMoLRE:
    """The model that save wrote, on the CPU, in eval mode; the file is untrusted.

    Raises:
        ValueError: it is damaged, holds no MMoLRE, other tensors than its configuration asks for, or
            values that are not finite.
        OSError: it is missing or cannot be read.
    """
    with safefile.open_regular(Path(path)) as file:
        metadata, slices = safefile.read_header(file)
        _expect("mmolre" in metadata, str(path), "mmolre in its metadata", sorted(metadata))
        config = MMoLREConfig.from_dict(safefile.parse_json(metadata["mmolre"], str(path)))
        blocks = config.blocks * len(config.modalities)
        _expect(blocks <= len(slices), str(path), f"tensors of {blocks} blocks", len(slices))
        shapes = _shapes(config)
        found = {name: s.shape for name, s in slices.items() if s.dtype in safefile.DTYPES}
        differ = {n for n in shapes.keys() | slices.keys() if shapes.get(n) != found.get(n)}
        _expect(not differ, str(path), "the tensors of its configuration", sorted(differ))
        wanted = {
            name: torch.empty(shape, dtype=safefile.DTYPES[slices[name].dtype], device="meta")
            for name, shape in shapes.items()
        }
        tensors = safefile.read_tensors(file, slices, wanted)
    with torch.device("meta"):  # the file's tensors become the parameters: they are in memory once
        model = MMoLRE(config)
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if isinstance(module, UniTSE):
            module.expert_of_row = module._expert_of_row()
    return model.eval()


def _shapes(config):
    """{name: shape} of a model's parameters; all blocks of a modality are alike, so one is made."""
    with torch.device("meta"):
        first = MMoLRE(dataclasses.replace(config, blocks=1)).state_dict()
    shapes = {}
    for name, tensor in first.items():
        kind, _, rest = name.partition(".")
        modality, _, rest = rest.partition(".0.")
        more = range(config.blocks if kind == "encoders" else 0)
        names = [f"{kind}.{modality}.{block}.{rest}" for block in more] or [name]
        shapes |= dict.fromkeys(names, tuple(tensor.shape))
    return shapes


def _loss(name, kind, out, label):
    one = kind in ("mae", "mse") and label.dim() == 1
    shape = out.shape[:1] if kind == "multiclass" else out.shape
    label = label[:, None] if one else label
    if label.shape != shape:
        raise ValueError(f"labels[{name!r}]: expected {tuple(shape)}, got {tuple(label.shape)}")
    if kind == "multiclass":
        total = nn.functional.cross_entropy(out, label, reduction="sum", ignore_index=-100)
        return total / (label != -100).sum().clamp(min=1)
    there = ~label.isnan()
    label = torch.where(there, label, 0).to(out.dtype)
    each = {
        "mae": nn.functional.l1_loss,
        "mse": nn.functional.mse_loss,
        "multilabel": nn.functional.binary_cross_entropy_with_logits,
    }[kind](out, label, reduction="none")
    return torch.where(there, each, 0).sum() / there.sum().clamp(min=1)


def _expect(condition, name, expected, received):
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {brief(received)}")


def _expect_mask(name, mask, shape):
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"{name}: expected bool {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )


def _integer(name, value, low, high):
    _expect(
        type(value) is int and low <= value <= high, name, f"an integer in [{low}, {high}]", value
    )


def _number(name, value, high):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _expect(number and 0 <= value <= high, name, f"a number in [0, {high:g}]", value)


def _named(name, parts):
    _expect(isinstance(parts, Mapping), name, "a dict by name", parts)
    _expect(1 <= len(parts) <= MAX_PARTS, name, f"1 to {MAX_PARTS} of them", len(parts))
    for key in parts:  # they name submodules
        fits = isinstance(key, str) and key.isidentifier() and not hasattr(nn.ModuleDict, key)
        _expect(fits, name, "names that a ModuleDict can hold", key)
    return dict(parts)


def _fields(cls, name, fields):
    _expect(isinstance(fields, dict), name, "a dict of fields", fields)
    known = {field.name for field in dataclasses.fields(cls)}
    _expect(fields.keys() <= known, name, f"only the fields {sorted(known)}", sorted(fields))
    return fields
