"""What both demos do: train with a progress bar, and ask held-out items before and after."""

from tqdm import tqdm

import lora_moe
from examples.common import training

SEED = 0
LEARNING_RATE = 1e-3
PER_TASK = 8  # items of each task in a step: about 500 tokens


def look(model, tokenizer, three, when):
    """Held-out accuracy of each task, and what the model says to one item of each."""
    bar = tqdm(three, f"held-out, {when}")
    right = [training.accuracy(model, tokenizer, task) for task in bar]
    shown = [task.prompt(task.heldout[2][0]) for task in three]
    answers = [training.answer(model, tokenizer, prompt) for prompt in shown]
    wanted = [task.heldout[2][1] for task in three]
    return {"accuracy": right, "prompts": shown, "answers": answers, "wanted": wanted}


def train(model, batches):
    """The loss of each step, as the steps are made."""
    step = trainer(model, len(batches), lora_moe.aux_loss)
    bar = tqdm(batches, "training")
    for number, batch in enumerate(bar):
        loss = step(number, batch)
        bar.set_postfix(loss=f"{loss:.3f}")
        yield loss


def trainer(model, steps, penalty):
    """step(number, batch) -> loss; every contender is trained by this same function."""
    optimizer = training.optimizer_of(model, LEARNING_RATE)

    def step(number, batch):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * training.rate_at(number, steps)
        return training.train_step(model, optimizer, batch, penalty)

    return step
