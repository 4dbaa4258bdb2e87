"""What C-LoRAE's example trains on and is asked, and how large it is."""

import random
from dataclasses import dataclass

import numpy as np
import torch

from examples.c_lorae import data as kaomoji_sets
from examples.c_lorae import upper as parts
from examples.c_lorae.arms import TASKS
from examples.common import smollm2
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import extraction, visual

MAX_TEXT, MAX_ANSWER = 8, 10  # tokens


@dataclass(frozen=True)
class Size:
    layers: int | None  # of the model; None: all
    adapted: int  # of them, the upper ones
    train: tuple[int, int, int]
    validation: int
    heldout: int
    batch: tuple[int, int, int]  # items of each task in a step
    steps: int
    evaluations: int  # of the achievement, during a run


FULL = Size(None, 6, (1500, 150, 1500), 60, 500, (15, 2, 15), 100, 3)
QUICK = Size(4, 2, (60, 12, 60), 6, 12, (6, 2, 6), 6, 2)


class Study:
    """Data, and what the lower layers made of it; the same for every arm and seed."""

    def __init__(self, size, dtype):
        self.size, self.tokenizer = size, smollm2.load_tokenizer()
        model = smollm2.load_model(size.layers).to(dtype)
        below = len(model.model.layers) - size.adapted
        self.lower, self.upper = parts.Lower(model, below), parts.upper(model, below)
        self.dtype = dtype
        self.tasks = kaomoji_sets.load(size.train, size.validation, size.heldout)
        self.eye = kaomoji_sets.Eye([item.drawing for task in self.tasks for item in task.train])
        self.train = [self._training(t, task.train) for t, task in enumerate(self.tasks)]
        self.validation = self._questions([task.validation for task in self.tasks])
        self.heldout = self._questions([task.heldout for task in self.tasks])

    def prompt(self, task, item):
        text = self.tokenizer.encode(item.text)[:MAX_TEXT]
        schema = kaomoji_sets.SCHEMAS[task]
        return self.tokenizer.encode(
            extraction.instruction(schema, self.tokenizer.decode(text), brief=True)
        )

    def _training(self, task, items):
        """[(hidden (L, D), targets (L,), picture (P, D_v), mask (P,))] of a task."""
        prompts = [self.prompt(task, item) for item in items]
        ends = [
            [*self.tokenizer.encode(" " + item.answer), self.tokenizer.eos_token_id]
            for item in items
        ]
        hidden = self.lower.hidden([p + e[:-1] for p, e in zip(prompts, ends)])
        targets = [torch.tensor([-100] * (len(p) - 1) + e) for p, e in zip(prompts, ends)]
        return list(zip(hidden, targets, *self.eye([item.drawing for item in items])))

    def _questions(self, items):
        """[(task, item)] of all tasks, and their Prompts."""
        asked = [(t, item) for t, of_task in enumerate(items) for item in of_task]
        return asked, self.lower.prompts([self.prompt(*question) for question in asked])

    def batches(self, seed, steps, counts):
        """(hidden (B, L, D), targets (B, L), pictures, mask, tasks (B,)) of each step."""
        rng = random.Random(seed)
        streams = [endless(items, rng) for items in self.train]
        for _ in range(steps):
            rows = [(next(streams[t]), t) for t, n in enumerate(counts) for _ in range(n)]
            hidden, targets, pictures, masks = zip(*(row for row, _ in rows))
            yield (
                torch.nn.utils.rnn.pad_sequence(hidden, True),
                torch.nn.utils.rnn.pad_sequence(targets, True, -100),
                torch.stack(pictures),
                torch.stack(masks),
                torch.tensor([t for _, t in rows]),
            )

    def answers(self, model, questions, pictures=True, expert=lambda t: t):
        """[(task, item, text)] of greedy generation.

        `pictures=False`: from the text alone; `expert`: which task's expert a task is given.
        """
        asked, prompts = questions
        said = [None] * len(asked)
        seen, masks = self.eye([item.drawing for _, item in asked])
        for group in prompts:
            c_lorae.set_tasks(model, torch.tensor([expert(asked[i][0]) for i in group.items]))
            shown = (seen[group.items], masks[group.items]) if pictures else (None,)
            visual.set_images(model, *shown)
            ids = parts.generate(self.lower, model, group, self.tokenizer.eos_token_id, MAX_ANSWER)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for i, text in zip(group.items, texts):
                said[i] = text.strip()
        return [(*question, text) for question, text in zip(asked, said)]

    def scores(self, model, questions, **how):
        """{task: [set F1 of each item]}"""
        found = {name: [] for name in TASKS}
        for task, item, text in self.answers(model, questions, **how):
            reading = extraction.read(kaomoji_sets.SCHEMAS[task], text)
            found[TASKS[task]].append(extraction.set_f1(reading, item.wanted))
        return found

    def f1(self, model, questions, **how):
        """{task: mean set F1}"""
        return {name: float(np.mean(s)) for name, s in self.scores(model, questions, **how).items()}


def endless(items, rng):
    while True:
        yield from rng.sample(items, len(items))
