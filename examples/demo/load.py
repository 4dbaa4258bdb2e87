"""The load of each expert, by layer and task."""

import torch

from examples.common import peers, tasks


@torch.no_grad()
def expert_load(model, tokenizer, three):
    """{kind of linear: load (layers, tasks, E)}, the share of a task's slots, without padding."""
    layers = peers.mixtures(model)
    load = {kind: [] for kind in peers.TARGETS}
    for task in three:
        rows = [tokenizer.encode(task.prompt(subject)) for subject, _ in task.heldout[:64]]
        ids = tasks.pad(rows, -1)  # (N, L)
        model.model(input_ids=ids.clamp(min=0), use_cache=False)
        chosen = {n: layer.routing.indices[ids.flatten() >= 0] for n, layer in layers.items()}
        for kind in load:
            load[kind].append(
                torch.stack([share(i) for n, i in chosen.items() if n.endswith(kind)])
            )
    return {kind: torch.stack(by_task, dim=1) for kind, by_task in load.items()}


def share(indices):
    """(E,): each expert's share of the slots."""
    return torch.bincount(indices.flatten(), minlength=peers.NUM_EXPERTS) / indices.numel()


def most_telling(load):
    """The kind of linear whose routing differs most between the tasks."""
    return max(
        load, key=lambda kind: (load[kind] - load[kind].mean(dim=1, keepdim=True)).abs().sum()
    )
