"""RouterMonitor: expert load during training, as numbers for the log, a warning, and a history.

    monitor = RouterMonitor(model)
    ...                                    # after the forward of each micro-batch:
    monitor.update()
    ...                                    # at intervals:
    log(monitor.summary(step))             # {"router/max_over_mean": ..., ...}, since the last summary
    monitor.save("adapter")                # router_history.json, for `lora-moe inspect adapter --png FILE`

Only `summary` synchronizes with the device.

Letters: L layers, E experts (of the layer with the most), K slots per token.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import nn

from . import forward_records
from .history import History
from .losses import counts_of, router_entropy
from .steering import layers_of

COLLAPSED = 0.95  # share of a layer's slots that K experts get
MIN_SLOTS_PER_EXPERT = 16  # minimum for the collapse warning


class RouterMonitor:
    """Counts the tokens of each expert per layer, excluding padding.

    Args:
        model: a model with experts.
        collapse: warn once if K = top_k < E of a layer's experts get this share of the slots since the
            last summary; None never warns.
    Raises:
        ValueError: if the model has no experts.
    """

    def __init__(self, model: nn.Module, collapse: float | None = COLLAPSED):
        self.layers = layers_of(model)
        self.collapse = collapse
        self.history = History(
            {name: layer.config.num_experts for name, layer in self.layers.items()}
        )
        self._seen = weakref.WeakSet()  # of records.Run
        self._reset()

    def _reset(self):
        self._counts: dict[str, torch.Tensor] = {}
        self._last: dict[str, tuple] = {}  # the last routing from a router, and its mask
        self._routed: set[str] = set()
        self._aux, self._updates = None, 0

    @torch.no_grad()
    def update(self, aux: torch.Tensor | None = None) -> None:
        """Count this thread's forwards since the last update.

        Args:
            aux: aux_loss(model), to include its mean in the summary.
        """
        for name, layer in self.layers.items():
            for run in self._new_runs(layer):
                self._count(name, run)
        if aux is not None:
            aux = aux.detach()
            self._aux = aux if self._aux is None else self._aux + aux
            self._updates += 1

    def _new_runs(self, layer):
        """New forwards with a graph, possibly several per step; else the last one in this mode."""
        record = forward_records.record_of(layer)
        last = record.training if layer.training else record.evaluation
        runs = record.pending if layer.training and record.pending else [last]
        new = [run for run in runs if run is not None and run not in self._seen]
        self._seen.update(new)
        return new

    def _count(self, name, run):
        routing, mask = run.routing, run.tokens.counted()
        counts = counts_of(routing, mask)
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts
        self._last.pop(name, None)
        if routing.logits is not None:
            self._routed.add(name)
            self._last[name] = routing._replace(logits=routing.logits.detach()), mask

    def summary(
        self, step: int, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> dict[str, float]:
        """Statistics since the last summary, then reset; synchronizes with the device.

        Args:
            step: for the history.
            reduce: sums a tensor over processes, such as accelerate's Accelerator.reduce.
        Returns:
            router/max_over_mean   largest expert load divided by the mean load, in the worst layer
            router/entropy         router_entropy of the last forward in nats, mean over layers
            router/dead            number of experts without tokens, over all layers
            router/aux_loss        mean of the values passed to update
            Entries that do not apply are left out; empty if no layer ran.
        """
        if reduce is None and not self._counts:
            return {}
        counts = self._stacked()
        counts = (counts if reduce is None else reduce(counts)).cpu()
        counts = dict(zip(self.layers, counts))
        loads = {name: self._load(name, row) for name, row in counts.items() if row.any()}
        numbers = self._numbers(loads)
        if self._aux is not None:
            numbers["router/aux_loss"] = float(self._aux) / self._updates
        if loads:
            self.history.append(step, {name: load.tolist() for name, load in loads.items()})
        self._warn(counts)
        self._reset()
        return numbers

    def _stacked(self):
        """Counts (L, E) int64, in the same shape on every process; zero for layers that did not run."""
        width = max(self.history.experts.values())
        device = next(iter(self.layers.values())).device
        rows = torch.zeros(len(self.layers), width, dtype=torch.int64, device=device)
        for row, name in zip(rows, self.layers):
            if name in self._counts:
                counts = self._counts[name]
                row[: counts.shape[0]] = counts
        return rows

    def _load(self, name, row):
        """(E,) share of the slots per expert of a layer."""
        row = row[: self.layers[name].config.num_experts].double()
        return row / row.sum()

    def _numbers(self, loads):
        if not loads:
            return {}
        numbers = {
            "router/max_over_mean": max(float(load.max() * len(load)) for load in loads.values()),
            "router/dead": float(sum(int((load == 0).sum()) for load in loads.values())),
        }
        entropies = [router_entropy(*given) for given in self._last.values()]
        if entropies:
            device = entropies[0].device
            mean = torch.stack([e.to(device) for e in entropies]).mean()
            numbers["router/entropy"] = float(mean)
        return numbers

    def _warn(self, counts):
        if self.collapse is None:
            return
        collapsed = [
            n for n, row in counts.items() if n in self._routed and self._collapsed(n, row)
        ]
        if not collapsed:
            return
        self.collapse = None
        config = self.layers[collapsed[0]].config
        warnings.warn(
            f"lora_moe: the routers of {', '.join(collapsed[:4])}{' ...' if collapsed[4:] else ''}"
            f" ({len(collapsed)} of {len(self.layers)} layers) collapsed: {config.top_k} of"
            f" {config.num_experts} experts get nearly every token. Raise balance_coef, lower the"
            " router's learning rate, or balance with selection_bias=True",
            stacklevel=3,
        )

    def _collapsed(self, name, row):
        config = self.layers[name].config
        E, K = config.num_experts, config.top_k
        total = int(row.sum())
        if K >= E or total < E * MIN_SLOTS_PER_EXPERT:
            return False
        return float(row.topk(K).values.sum()) >= self.collapse * total

    # --- on disk -----------------------------------------------------------------------------------

    def save(self, directory) -> None:
        """Write the history to directory/router_history.json, if there is any."""
        if self.history.steps:
            self.history.save(directory)

    def load(self, directory) -> None:
        """Continue the history of a checkpoint, if there is one for these layers."""
        found = History.load(directory, missing_ok=True)
        if found is not None and found.experts == self.history.experts:
            self.history = found
