"""Does one pass over x compute the same as the loop over experts?  Three comparisons.

    locked    the loop trains, and ours copies its weights before each step: the losses agree
    replayed  at some of these steps the loop uses our routing decisions: the gradients agree
    free      both train from the same start, each with its own rounding: the losses stay close

A decision is the set of K experts that a token gets in one of the 210 linears; if two logits nearly
tie, rounding may flip it.  In free training, flips feed back into the weights; in locked training,
they cannot.
"""

import torch
from tqdm import tqdm

from examples.common import peers
from examples.common.training import loss_of


def follow(loop, twin, batches, train, trace, checked):
    """Trains the loop on `batches` and makes the three comparisons; `trace`: (loss, decisions) of our run.

    twin: our model, with any weights.  train(step, batch): a training step of the loop, returns the loss.
    checked: the steps at which gradients are compared.
    """
    found = {
        "locked": [],
        "locked_flips": [],
        "free": [],
        "free_flips": [],
        "replayed": {},
        "loop": [],
    }
    for step, (batch, (loss, ids)) in enumerate(zip(tqdm(batches, "loop over experts"), trace)):
        peers.set_weights(twin, peers.weights(loop))
        if step in checked:
            found["replayed"][step + 1] = _gradient_error(loop, twin, batch)
        with torch.no_grad():
            twin_loss = loss_of(twin, *batch).item()
        twin_ids = peers.decisions(twin)
        loop_loss = train(step, batch)
        loop_ids = peers.decisions(loop)
        found["loop"].append(loop_loss)
        found["locked"].append(abs(twin_loss / loop_loss - 1))
        found["locked_flips"].append(flips(twin_ids, loop_ids))
        found["free"].append(abs(loss / loop_loss - 1))
        found["free_flips"].append(flips(ids, loop_ids))
    found["decisions"] = sum(len(chosen) for chosen in loop_ids.values())  # per step
    return found


def flips(ids, others):
    """Number of decisions that differ; the order of the K experts does not matter."""
    return sum(
        (chosen.sort(dim=1).values != others[name].sort(dim=1).values).any(dim=1).sum().item()
        for name, chosen in ids.items()
    )


def _gradient_error(loop, twin, batch):
    """||ours - loop|| / ||loop|| (Frobenius) of all gradients as one vector, and of the worst tensor."""
    loss_of(twin, *batch).backward()
    peers.replay(loop, peers.decisions(twin))
    loss_of(loop, *batch).backward()
    peers.replay(loop, None)
    pairs = zip(_tensors(peers.gradients(twin)), _tensors(peers.gradients(loop)))
    errors = [((a - b).norm().item(), b.norm().item()) for a, b in pairs]
    twin.zero_grad()
    loop.zero_grad()
    error, norm = (sum(value**2 for value in values) ** 0.5 for values in zip(*errors))
    worst = max(e / n for e, n in errors if n)  # no gradient reaches A while B is still zero
    return error / norm, worst


def _tensors(gradients):
    return (tensor.double() for three in gradients.values() for tensor in three)
