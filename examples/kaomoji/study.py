"""Training and evaluation data of the kaomoji experiment, prepared once for every arm, rate and seed."""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import lora_moe
from examples.common import smollm2
from examples.common.tasks import endless
from examples.kaomoji import data, pictures
from examples.kaomoji.arms import TASKS
from examples.kaomoji.upper import Lower, generate, upper
from lora_moe.methods.c_lorae import extraction, visual

MAX_TEXT, MAX_ANSWER = 8, 8  # tokens; no correct answer has more than 7


@dataclass(frozen=True)
class Size:
    layers: int | None  # of the model, from the bottom; None: all
    adapted: int  # upper layers that are adapted
    train: tuple[int, int, int]  # items of each task
    validation: int  # items per task, as in the held-out split
    heldout: int
    batch: tuple[int, int, int]  # items of each task per step
    steps: int


FULL = Size(None, 6, (1500, 150, 1500), 100, 300, (8, 1, 8), 300)
QUICK = Size(4, 2, (60, 12, 60), 6, 6, (6, 2, 6), 3)


class Study:
    """The data and its hidden states below the adapted layers."""

    def __init__(self, size, dtype):
        self.tasks = data.load(size.train, size.validation, size.heldout)
        self.size, self.tokenizer = size, smollm2.load_tokenizer()
        model = smollm2.load_model(size.layers).to(dtype)
        below = len(model.model.layers) - size.adapted
        self.lower, self.upper = Lower(model, below), upper(model, below)
        self.eye = pictures.Eye([item.drawing for task in self.tasks for item in task.train])
        self.train = [self._training(t, task.train) for t, task in enumerate(self.tasks)]
        self.validation = self._questions([task.validation for task in self.tasks])
        self.heldout = self._questions([task.heldout for task in self.tasks])

    def prompt(self, task, item):
        text = self.tokenizer.decode(self.tokenizer.encode(item.text)[:MAX_TEXT])
        return self.tokenizer.encode(extraction.instruction(data.SCHEMAS[task], text, brief=True))

    def _training(self, task, items):
        """[(hidden (L, D), targets (L,), picture (P, D_v), mask (P,))] of a task."""
        end = self.tokenizer.eos_token_id
        prompts = [self.prompt(task, item) for item in items]
        answers = [[*self.tokenizer.encode(" " + item.answer), end] for item in items]
        hidden = self.lower.hidden([p + a[:-1] for p, a in zip(prompts, answers)])
        targets = [torch.tensor([-100] * (len(p) - 1) + a) for p, a in zip(prompts, answers)]
        return list(zip(hidden, targets, *self.eye([item.drawing for item in items])))

    def _questions(self, items):
        """([(task, item)] of all tasks, their Prompts)."""
        asked = [(t, item) for t, of_task in enumerate(items) for item in of_task]
        return asked, self.lower.prompts([self.prompt(*question) for question in asked])

    def batches(self, seed):
        """(hidden (B, L, D), targets (B, L), pictures, mask, tasks (B,)) of each step."""
        rng = random.Random(seed)
        streams = [endless(items, rng) for items in self.train]
        tasks = [t for t, count in enumerate(self.size.batch) for _ in range(count)]
        for _ in range(self.size.steps):
            hidden, targets, shown, masks = zip(*(next(streams[t]) for t in tasks))
            padded = pad_sequence(hidden, True), pad_sequence(targets, True, -100)
            yield *padded, torch.stack(shown), torch.stack(masks), torch.tensor(tasks)

    def answers(self, model, questions, shown=True, expert=lambda t: t):
        """[(task, item, text)] of greedy generation.

        `shown=False` hides the pictures; `expert` maps a task to the task whose expert is used.
        """
        asked, prompts = questions
        said = [None] * len(asked)
        seen, masks = self.eye([item.drawing for _, item in asked])
        tasks = torch.tensor([expert(task) for task, _ in asked])
        end = self.tokenizer.eos_token_id
        for group in prompts:
            images = (seen[group.items], masks[group.items]) if shown else ()
            tell_rows = partial(tell, model, tasks[group.items], images)
            ids = generate(self.lower, model, group, end, MAX_ANSWER, tell_rows)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for i, text in zip(group.items, texts):
                said[i] = text.strip()
        return [(*question, text) for question, text in zip(asked, said)]

    def scores(self, model, questions, **how):
        """{task: [set F1 of each item]}"""
        found = {name: [] for name in TASKS}
        for task, item, text in self.answers(model, questions, **how):
            reading = extraction.read(data.SCHEMAS[task], text)
            found[TASKS[task]].append(extraction.set_f1(reading, item.wanted))
        return found

    def f1(self, model, questions, **how):
        """Mean set F1 of each task, and the mean of these."""
        return float(np.mean([np.mean(s) for s in self.scores(model, questions, **how).values()]))


def tell(model, tasks, images, rows):
    """Sets the samples of the next forwards, by rows; `images`: (features, mask), or ()."""
    set_tasks(model, tasks[rows])
    visual.set_images(model, *([given[rows] for given in images] or [None]))


def set_tasks(model, tasks):
    """Sets the task of each sample (B,); does nothing for arms without task experts."""
    if any(layer.config.num_tasks for layer in lora_moe.injected(model).values()):
        lora_moe.set_routing(model, task_ids=tasks)
