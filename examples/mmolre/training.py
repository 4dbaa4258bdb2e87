"""Trains one model with early stopping on the validation items; records its tasks' gradients."""

import copy

import torch

from examples.mmolre.losses import normalized

WEIGHT_DECAY = 0.01
LOOKS = 24  # validations per run


def train(build, batches, steps, rate, seed, scale, validation, probe=None):
    """(model at its best look, record of the training); best by the mean of the normalized losses.

    AdamW with warmup, then linear decay to zero.
    build: builds the model.
    probe: training items; every second look records the tasks' gradients on them.
    """
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
    warm, every = max(1, steps // 20), max(1, steps // LOOKS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, (steps - n) / (steps - warm + 1))
    )
    best, inner = Best(model), []
    for step, items in enumerate(batches, 1):
        loss = mean(normalized(model, items, scale))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            model.eval()  # without dropout
            best.look(step, validation, scale)
            if probe is not None and len(best.losses) % 2:
                inner.append(gradients(model, normalized(model, probe, scale)))
            model.train()
    return best.model(), {"step": best.step, "validation": best.losses, "gradients": inner}


def mean(losses):
    return sum(losses.values()) / len(losses)


class Best:
    """A model's state at its best look."""

    def __init__(self, model):
        self.trained, self.loss, self.losses = model, float("inf"), []

    @torch.no_grad()
    def look(self, step, items, scale):
        losses = {n: loss.item() for n, loss in normalized(self.trained, items, scale).items()}
        self.losses.append([step, losses])
        if mean(losses) < self.loss:
            self.loss, self.step = mean(losses), step
            self.state = copy.deepcopy(self.trained.state_dict())

    def model(self):
        self.trained.load_state_dict(self.state)
        return self.trained.eval()


def gradients(model, losses):
    """Inner products (tasks, tasks) of the tasks' gradients over all shared parameters, heads excluded."""
    shared = [p for name, p in model.named_parameters() if not name.startswith("heads.")]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
        for loss in losses.values()
    ]
    rows = torch.stack(rows).double()
    return (rows @ rows.T).tolist()
