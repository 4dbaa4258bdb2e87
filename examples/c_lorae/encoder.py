"""Several tasks answered in words by MiniLM: texts, hidden states of its lower layers, answers.

Nothing below layer FIRST is adapted, so its hidden states are computed once for all arms and seeds.  The
answer to a text is the nearest of the answers' embeddings by the untuned encoder; there is no head.
"""

import copy
from typing import NamedTuple

import torch

from examples.common import minilm
from examples.common.training import chunks

FIRST = 4  # of 6 layers; the upper two are adapted
LINEARS = r".*\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
TEMPERATURE = 0.05


class Batch(NamedTuple):
    hidden: torch.Tensor  # (B, L, D), below the first adapted layer
    mask: torch.Tensor  # (B, L)
    wanted: torch.Tensor  # (B,), indices of the answers
    tasks: torch.Tensor  # (B,)


class Encoder:
    """The untuned model, and the embeddings of `answers` (A texts) that items are compared with."""

    def __init__(self, answers):
        self.tokenizer, self.untuned = minilm.load_tokenizer(), minilm.load_model()
        self.answers = sorted(answers)
        hidden = self.lower(self.answers)
        upper = minilm.Upper(self.untuned, FIRST)
        with torch.no_grad():
            each = [minilm.pool(upper(h[None], m), m) for h in hidden for m in [_ones(h)]]
        self.targets = torch.cat(each)  # (A, D)

    @torch.no_grad()
    def lower(self, texts, size=128):
        """[(L, D)]: hidden states of each text below layer FIRST."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = [None] * len(texts)
        for rows in chunks(order, size):
            tokens = self.tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True)
            hidden = self.untuned(**tokens, output_hidden_states=True).hidden_states[FIRST]
            for i, states, length in zip(rows, hidden, tokens["attention_mask"].sum(1).tolist()):
                found[i] = states[:length].clone()
        return found

    def adaptable(self):
        """A copy of the layers to adapt, with separate weights."""
        return minilm.Upper(copy.deepcopy(self.untuned), FIRST)

    def scores(self, model, batch):
        """Cosines with the answers divided by the temperature, (B, A)."""
        hidden = model(batch.hidden, batch.mask)
        return minilm.pool(hidden, batch.mask) @ self.targets.T / TEMPERATURE


def _ones(hidden):
    return torch.ones(1, len(hidden), dtype=torch.long)


class Items:
    """[(task, text, answer)], encoded once."""

    def __init__(self, encoder, items):
        self.hidden = encoder.lower([text for _, text, _ in items])
        self.tasks = torch.tensor([task for task, _, _ in items])
        self.wanted = torch.tensor([encoder.answers.index(answer) for *_, answer in items])

    def __len__(self):
        return len(self.hidden)

    def batch(self, rows):
        """Batch of the items with these indices."""
        hidden = [self.hidden[i] for i in rows]
        mask = torch.arange(max(map(len, hidden))) < torch.tensor([[len(h)] for h in hidden])
        padded = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
        return Batch(padded, mask.long(), self.wanted[rows], self.tasks[rows])

    def all(self, size=128):
        """[(rows, Batch)] of all items, grouped by length."""
        order = sorted(range(len(self)), key=lambda i: len(self.hidden[i]))
        return [(rows, self.batch(rows)) for rows in chunks(order, size)]
