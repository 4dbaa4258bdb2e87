"""A training loop that can be resumed.

A checkpoint is a folder OUT/checkpoint-N with the adapter, the optimizer and the state of the random
number generators; the batches after step N follow from the seed.
"""

import math
import shutil

import torch
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

TRAINING = "training.pt"  # written last: a checkpoint that has it is complete


def steps_of(args, items):
    """--steps if given, otherwise the steps of --epochs."""
    return args.steps or math.ceil(args.epochs * items / (args.batch_size * args.accumulate))


class Order(Sampler):
    """Batches `start` to `stop` of indices; each epoch is shuffled anew.

    The last, incomplete batch of an epoch is dropped.
    """

    def __init__(self, items, size, start, stop, seed):
        self.items, self.size, self.seed = items, min(size, items), seed
        self.numbers = range(start, stop)

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        of, order = None, []
        for number in self.numbers:
            epoch, place = divmod(number, self.items // self.size)
            if epoch != of:
                random = torch.Generator().manual_seed(self.seed + epoch)
                of, order = epoch, torch.randperm(self.items, generator=random).tolist()
            yield order[place * self.size : (place + 1) * self.size]


def train(groups, items, collate, loss_of, args, *, steps, out, save, watch=None, extra_state=None):
    """AdamW without weight decay; returns the loss of each step.

    Args:
        groups: [{"params": parameters, "rate": learning rate}].
        items, collate: a dataset, and the function that collates a list of items into a batch.
        loss_of: loss_of(batch) returns the loss.
        save: save(folder) writes the trained parameters.
        watch: watch(step) is called after each step.
        extra_state: a module whose state is saved with the checkpoints.
    """
    optimizer = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.0)
    done, losses = resume(out, args, steps, optimizer, extra_state)
    order = Order(
        len(items), args.batch_size, done * args.accumulate, steps * args.accumulate, args.seed
    )
    loader = DataLoader(
        items, batch_sampler=order, collate_fn=collate, num_workers=args.workers,
        generator=torch.Generator(),  # otherwise it draws from the global one, which is checkpointed
    )  # fmt: skip
    batches = iter(loader)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step in tqdm(range(done + 1, steps + 1), initial=done, total=steps, unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate_at(step, steps, args.warmup)
        losses.append(backward(batches, loss_of, args.accumulate))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"step {step}: expected a finite loss, got {losses[-1]}")
        torch.nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if watch is not None:
            watch(step)
        if step % args.save_every == 0 or step == steps:
            checkpoint(out, step, steps, losses, args, save, optimizer, extra_state)
    return losses


def backward(batches, loss_of, accumulate):
    total = 0.0
    for _ in range(accumulate):
        loss = loss_of(next(batches)) / accumulate
        loss.backward()
        total += loss.item()
    return total


def rate_at(step, steps, warmup):
    """Learning rate multiplier at step 1, 2, ...: linear warmup, then cosine decay."""
    rising = warmup * steps
    if step <= rising:
        return step / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising - 1) / max(1.0, steps - rising))


def newest(out):
    """Folder of the last complete checkpoint, or None."""
    found = [path.parent for path in out.glob(f"checkpoint-*/{TRAINING}")]
    return max(found, key=lambda folder: int(folder.name.partition("-")[2]), default=None)


def checkpoint(out, step, steps, losses, args, save, optimizer, extra_state):
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    save(folder)
    state = {
        "losses": losses,
        "same": same_of(args, steps),
        "optimizer": optimizer.state_dict(),
        "extra_state": extra_state.state_dict() if extra_state is not None else {},
        "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
    }
    torch.save(state, folder / "new.pt")
    (folder / "new.pt").replace(folder / TRAINING)
    for older in out.glob("checkpoint-*"):
        if older != folder:
            shutil.rmtree(older)


def same_of(args, steps):
    """{name: value} of the settings that must equal those of the checkpoint."""
    names = ("batch_size", "accumulate", "seed")
    return {name: getattr(args, name) for name in names} | {"steps": steps}


def resume(out, args, steps, optimizer, extra_state):
    """(steps done, their losses); the script itself loads the adapter."""
    folder = newest(out)
    if folder is None:
        return 0, []
    state = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    same = same_of(args, steps)
    if state["same"] != same:
        raise SystemExit(f"{folder}: expected a checkpoint of {same}, got {state['same']}")
    optimizer.load_state_dict(state["optimizer"])
    if extra_state is not None:
        extra_state.load_state_dict(state["extra_state"])
    cpu, *cuda = state["random"]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)
    return len(state["losses"]), state["losses"]
