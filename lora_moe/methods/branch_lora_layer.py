"""BranchLoRA's layer, and what the layers of a model share: the task, and the tokens that decide.

    y_i = W0 x_i + s * sum over j in topk(W_t x_*) of  g_j * B_j A x_i        for every token i of a sequence

Letters: B sequences, L tokens each, E branches, r the rank of the trunk and of each branch.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import nn

from .. import functional as F
from ..config import LoraMoeConfig
from ..context import recomputing
from ..parts import ROUTER_STD
from ..routing import Routing
from ..tensors import adapter_tensors, device_of, linear_features

READS = ("first", "mean", "token")
IGNORED = -100  # the label of a token that no loss asks for


class Sequences:
    """What the layers of a model share: the task, and the tokens by which its sequences decide.

    Attributes:
        reads: "first", "mean" or "token".
        causal: labels are the model's own tokens, so that what the loss asks for must not decide.
        bank: bank[t] is the number of task t's router.
        learning: a task has begun and not ended.
        task: whose router decides: a number, or (B,) one for each sequence.
        mask: (B, L) bool, the tokens that may decide; None for all.
        given_mask: the caller's, in place of the one that is read off the model's arguments.
        decoding: the prompt stands in a cache: its decision stays.
        also: names of the modules that train besides the layers.
    """

    def __init__(self, reads: str, causal: bool, also: tuple[str, ...] = ()):
        self.reads, self.causal, self.also = reads, causal, also
        self.bank: list[int] = []
        self.learning = False
        self.task: int | torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.given_mask: torch.Tensor | None = None
        self.decoding = False

    @property
    def counting(self) -> bool:
        """The task that is being learned decides; not, say, an earlier one that is looked at."""
        return self.learning and isinstance(self.task, int) and self.task == len(self.bank) - 1

    def before_forward(self, model, args, kwargs):
        """A forward pre-hook: reads attention_mask, labels and past_key_values, changes nothing."""
        given = dict(zip(inspect.signature(model.forward).parameters, args)) | kwargs
        past = given.get("past_key_values")
        self.decoding = past is not None and int(past.get_seq_length()) > 0
        if not self.decoding:
            mask = self.given_mask
            self.mask = self._read_off(given) if mask is None else mask

    def _read_off(self, given):
        """Real tokens before the first that the loss asks for, and the first real one in any case."""
        mask, labels = given.get("attention_mask"), given.get("labels")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected (B, L), got {got}; see set_mask")
        if self.reads == "token" or not self.causal or labels is None:
            return None if mask is None else mask.bool()
        real = torch.ones_like(labels) if mask is None else mask
        if real.shape != labels.shape:
            raise ValueError(
                f"labels: expected {tuple(real.shape)} as attention_mask, got {tuple(labels.shape)}"
            )
        prompt = real.bool() & ((labels != IGNORED).cumsum(1) == 0)
        return prompt.scatter(1, first_of(real)[:, None], True)


class BranchLoraLinear(nn.Module):
    """A frozen linear map, a trunk, branches, and a router for each task, in place of `base`.

    Parameters are lora_A (r, D_in); branches, a list of (r, D_out), where row i pairs with row i of
    lora_A; routers, a list of (E_t, D_in), E_t being the branches there were when the task began.
    Branches are parameters of their own, so that an optimizer leaves a frozen one alone whatever
    its weight decay or momentum.  The layer starts as `base` bit for bit, since branches start as
    zero; lora_A starts uniform in +-1/sqrt(D_in), a router normal with std 0.02.

    Attributes:
        base_layer: the module that this one stands for.
        usage: (E,), routed weight that the open task gave to each branch in training.
        frozen: ids of the branches that no longer train.
        routing: the last decision, a row for each sequence (or token), detached.

    Args:
        base: a linear module (see LoraMoeLinear).
        config: with shared_a, such as branch_lora() makes.
        sequences: shared with the model's other layers; see inject.
    Raises:
        TypeError, ValueError: base is not linear, or the configuration is no BranchLoRA.
    """

    def __init__(self, base: nn.Module, config: LoraMoeConfig, sequences: Sequences):
        super().__init__()
        if linear_features(base) is None or isinstance(base, BranchLoraLinear):
            raise TypeError(f"base: expected a linear module, got {type(base).__name__}")
        if not config.shared_a or config.selection_bias:
            raise ValueError(
                "config: expected shared_a=True and no selection_bias; see branch_lora()"
            )
        self.in_features, self.out_features = linear_features(base)
        self.config, self.sequences, self.base_layer = config, sequences, base
        self.rank, self.scaling = config.ranks[0], config.scales[0]
        self.frozen: tuple[int, ...] = ()
        self.routing: Routing | None = None
        trunk = torch.empty_like(adapter_tensors(base, config)["lora_A"], device=device_of(base))
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(trunk, a=math.sqrt(5)))
        self.branches, self.routers = nn.ParameterList(), nn.ParameterList()
        self.register_buffer("usage", torch.zeros(0, device=trunk.device))
        self.add_branches(config.num_experts)
        self.train(base.training)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def add_branches(self, n: int) -> None:
        """n more, zero, for the tasks to come: the routers that are there do not know them."""
        for _ in range(n):
            self.branches.append(nn.Parameter(self.lora_A.new_zeros(self.rank, self.out_features)))
        self.usage = torch.cat([self.usage, self.usage.new_zeros(n)])

    def add_router(self) -> None:
        router = self.lora_A.new_empty(len(self.branches), self.in_features)
        self.routers.append(nn.Parameter(nn.init.normal_(router, std=ROUTER_STD)))

    def freeze_most_used(self, k: int) -> None:
        """The k branches with the most usage, of those with any; lower ids first among equals."""
        usage = self.usage.tolist() if k else []
        order = sorted(range(len(usage)), key=lambda e: (-usage[e], e))
        self.freeze({e for e in order[:k] if usage[e] > 0} | set(self.frozen))
        self.usage.zero_()

    def freeze(self, ids) -> None:
        self.frozen = tuple(sorted(ids))
        for e in self.frozen:
            self.branches[e].requires_grad_(False)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """base_layer(x, ...) plus the branches, in the base's dtype.  (B, L, D_in) -> (B, L, D_out)"""
        y = self.base_layer(x, *args, **kwargs)
        if F.autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # the base has decided on y's dtype
                return self._add_experts(x.to(y.dtype), y)
        return self._add_experts(x if x.dtype == y.dtype else x.to(y.dtype), y)

    def _add_experts(self, x, base):
        task, reads = self.sequences.task, self.sequences.reads
        if task is None:
            raise RuntimeError("model: expected a task; call begin_task or set_task first")
        mixed = isinstance(task, torch.Tensor)
        E = len(self.branches) if mixed else self._router(task).shape[0]  # a router's own branches
        experts = {
            "rank_offsets": self.rank,
            "scaling": self.scaling,
            "shared_a": True,
            "base": base,
            "frozen": [e for e in self.frozen if e < E],
        }
        bank = torch.cat(list(self.branches)[:E])  # (E r, D_out)
        dropout = self.config.dropout if self.training else 0.0
        if reads == "token" and not mixed and not dropout:
            router, choice = self._router(task), self._choice()
            y, routing = F.routed_lora(x, router, self.lora_A, bank, **choice, **experts)
            self._remember(routing)
            return y
        routing = self._decide(x, task)
        x = nn.functional.dropout(x, dropout) if dropout else x
        return F.grouped_lora(x, self.lora_A, bank, routing, **experts)

    def _decide(self, x, task):
        """A row for every token: the sequence's decision, its own, or the one of the prompt."""
        sequences = self.sequences
        if sequences.reads == "token":
            tokens = math.prod(x.shape[1:-1])
            task = task.repeat_interleave(tokens) if isinstance(task, torch.Tensor) else task
            routing = self._route(x.flatten(0, -2), task)
            self._remember(routing)
            return routing
        if x.dim() != 3:
            raise ValueError(
                f"x: expected (B, L, D_in) to decide by sequence, got {tuple(x.shape)}"
            )
        if sequences.decoding:
            routing = self.routing
            if routing is None or routing.indices.shape[0] != x.shape[0]:
                kept = 0 if routing is None else routing.indices.shape[0]
                raise ValueError(
                    f"past_key_values: expected those of the last prompts, {kept} sequences,"
                    f" got {x.shape[0]}"
                )
        else:
            routing = self._route(read(x, sequences.mask, sequences.reads), task)
            self._remember(routing)
        return routing.repeat(x.shape[1])

    def _route(self, rows, task):
        """rows (N, D_in), task a number or (N,) -> Routing of N rows."""
        if not isinstance(task, torch.Tensor):
            return F.router_topk(rows, self._router(task), **self._choice())
        if task.shape[0] != rows.shape[0]:
            raise ValueError(
                f"task: expected {rows.shape[0]}, one per sequence, got {task.shape[0]}"
            )
        task = task.to(rows.device)
        each = [self._route(rows, t) for t in range(len(self.sequences.bank))]
        pick = torch.arange(rows.shape[0], device=rows.device)
        ids = torch.stack([routing.indices for routing in each])[task, pick]
        weights = torch.stack([routing.weights for routing in each])[task, pick]
        return Routing.from_ids(ids, weights, num_experts=len(self.branches))

    def _router(self, task):
        return self.routers[self.sequences.bank[task]]

    def _choice(self):
        config = self.config
        return {
            "top_k": config.top_k,
            "gate": config.gate,
            "renormalize": config.normalizes,
        }

    @torch.no_grad()
    def _remember(self, routing):
        """Keep the decision, and count it if a task is being learned; once in spite of checkpoints."""
        if recomputing():
            return
        ids, weights = routing.indices, routing.weights.detach()
        self.routing = Routing(ids, weights, routing.counts)
        if self.training and self.sequences.counting:
            mask = self.sequences.mask
            if self.sequences.reads == "token" and mask is not None:
                weights = weights * mask.to(weights.device).reshape(-1, 1)
            self.usage.index_add_(0, ids.flatten().long(), weights.flatten().to(self.usage.dtype))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.usage = self.usage.float()  # .half() must not stop the counting
        return self

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.rank},"
            f" branches={len(self.branches)}, frozen={self.frozen}, routers={len(self.routers)},"
            f" top_k={c.top_k}, scaling={self.scaling:g}, reads={self.sequences.reads}"
        )


def read(x: torch.Tensor, mask: torch.Tensor | None, how: str) -> torch.Tensor:
    """What a sequence decides by: its first token of the mask, or their mean.

    x (B, L, D), mask (B, L) or None -> (B, D)
    """
    if mask is None:
        return x[:, 0] if how == "first" else x.mean(1)
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask: expected {tuple(x.shape[:2])} as x, got {tuple(mask.shape)}"
        )
    mask = mask.to(x.device)
    if how == "first":
        return x[torch.arange(x.shape[0], device=x.device), first_of(mask)]
    total = (mask[:, None].to(x.dtype) @ x).squeeze(1)  # (B, D)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def first_of(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B,), where each row's first true element stands; 0 without any."""
    return (mask != 0).int().argmax(1)
