"""A training step, the accuracy on a task and greedy answers, shared by all contenders."""

import torch
import torch.nn.functional as F

from examples.common.tasks import pad


def optimizer_of(model, learning_rate):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)


def rate_at(step, steps, warmup=5):
    """Learning rate multiplier: a short linear warmup, then linear decay to a tenth."""
    return min(1.0, (step + 1) / warmup, 1.0 - 0.9 * step / steps)


def loss_of(model, ids, targets):
    """Mean cross entropy on the answers; logits are computed only at the positions of answers."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (N, L, D)
    asked = targets >= 0
    return F.cross_entropy(model.lm_head(hidden[asked]), targets[asked])


def train_step(model, optimizer, batch, penalty=None):
    """Forward, backward, update; returns the loss before the update."""
    loss = loss_of(model, *batch)
    (loss if penalty is None else loss + penalty(model)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.no_grad()
def accuracy(model, tokenizer, task, batch_size=64):
    """Share of held-out items whose correct answer is the likeliest of the task's labels."""
    names = [tokenizer.encode(" " + label) for label in task.labels]
    assert all(len(name) == 1 for name in names), "each label is one token, so one forward decides"
    right = 0
    for items in chunks(task.heldout, batch_size):
        rows = [tokenizer.encode(task.prompt(subject)) for subject, _ in items]
        hidden = model.model(input_ids=pad(rows, 0), use_cache=False).last_hidden_state
        last = hidden[range(len(rows)), [len(row) - 1 for row in rows]]  # (N, D)
        best = model.lm_head(last)[:, [name[0] for name in names]].argmax(dim=-1)
        right += sum(task.labels[b] == label for b, (_, label) in zip(best.tolist(), items))
    return right / len(task.heldout)


@torch.no_grad()
def answer(model, tokenizer, prompt, max_tokens=12):
    """The model's greedy answer as text."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False, use_cache=True)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]
