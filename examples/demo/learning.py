"""Shared by both demos: training with a progress bar, and held-out accuracy before and after."""

from tqdm import tqdm

import lora_moe
from examples.common import training

SEED = 0
LEARNING_RATE = 1e-3
PER_TASK = 8  # items of each task per step, about 500 tokens


def look(model, tokenizer, learned, when, items=(2,)):
    """Held-out accuracy of each task, and the model's answers to some of its items."""
    bar = tqdm(learned, f"held-out, {when}")
    right = [training.accuracy(model, tokenizer, task) for task in bar]
    shown = [
        (task.prompt(subject), label) for task in learned for subject, label in _of(task, items)
    ]
    answers = [training.answer(model, tokenizer, prompt) for prompt, _ in shown]
    prompts, wanted = zip(*shown)
    return {"accuracy": right, "prompts": prompts, "answers": answers, "wanted": wanted}


def _of(task, items):
    return [task.heldout[i] for i in items]


def train(model, batches):
    """Trains on the batches, yielding the loss after each step."""
    step = trainer(model, len(batches), lora_moe.aux_loss)
    bar = tqdm(batches, "training")
    for number, batch in enumerate(bar):
        loss = step(number, batch)
        bar.set_postfix(loss=f"{loss:.3f}")
        yield loss


def trainer(model, steps, penalty):
    """Returns step(number, batch) -> loss, the training step used for every contender."""
    optimizer = training.optimizer_of(model, LEARNING_RATE)

    def step(number, batch):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * training.rate_at(number, steps)
        return training.train_step(model, optimizer, batch, penalty)

    return step
