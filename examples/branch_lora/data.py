"""The items, encoded once and shared by all arms, orders and processes."""

import random
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from examples.branch_lora.tasks import load_tasks
from examples.common import minilm
from examples.common.training import chunks

FIRST = 4  # first layer with experts: its [CLS] has seen the sentence; lower layers run only once
BATCH, ASKED = 16, 40  # items per training step and per evaluation batch


class Batch(NamedTuple):
    hidden: torch.Tensor  # (B, L, D), below the first layer with experts
    mask: torch.Tensor  # (B, L), padding on the right
    wanted: torch.Tensor  # (B,), ids of the answers
    frozen: torch.Tensor  # (B, D), embeddings of the untuned encoder


class Data:
    """The training batches of each task for each seed, and the evaluation items of all arms."""

    def __init__(self, split, items, steps, seeds, tasks=None):
        self.split, self.items = split, items
        self.tasks = load_tasks()[:tasks]
        self.tokenizer, self.untuned = minilm.load_tokenizer(), minilm.load_model()
        self.answers = sorted({answer for task in self.tasks for answer in task.answers})
        self.targets = self.encode([(answer, answer) for answer in self.answers]).frozen  # (A, D)
        self.asked = [self.questions(task) for task in self.tasks]
        self.batches = {seed: [self.lesson(t, steps, seed) for t in self.tasks] for seed in seeds}

    def questions(self, task):
        """Batches of the held-out items, grouped by length to reduce padding."""
        pairs = sorted(task.fixed(self.split, self.items), key=lambda pair: len(pair[0]))
        return [self.encode(some) for some in chunks(pairs, ASKED)]

    def lesson(self, task, steps, seed):
        return [self.encode(pairs) for pairs in task.batches(steps, BATCH, seed)]

    def tokens(self, pairs):
        return self.tokenizer([text for text, _ in pairs], return_tensors="pt", padding=True)

    def wanted(self, pairs):
        return torch.tensor([self.answers.index(answer) for _, answer in pairs])

    @torch.no_grad()
    def encode(self, pairs):
        tokens = self.tokens(pairs)
        hidden = self.untuned(**tokens, output_hidden_states=True).hidden_states
        mask = tokens["attention_mask"]
        return Batch(hidden[FIRST], mask, self.wanted(pairs), minilm.pool(hidden[-1], mask))


def mixed(lessons, seed):
    """The items of all lessons, shuffled, as one lesson with as many batches."""
    items = []
    for batch in (batch for lesson in lessons for batch in lesson):
        for hidden, mask, wanted, frozen in zip(*batch):
            length = int(mask.sum())
            items.append((hidden[:length], mask[:length], wanted, frozen))
    random.Random(seed).shuffle(items)
    return [_padded(some) for some in chunks(items, BATCH)]


def _padded(items):
    hidden, mask, wanted, frozen = zip(*items)
    sequences = pad_sequence(hidden, True), pad_sequence(mask, True)
    return Batch(*sequences, torch.stack(wanted), torch.stack(frozen))
