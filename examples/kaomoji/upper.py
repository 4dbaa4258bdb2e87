"""Splits a decoder: the upper layers are trained, the lower ones run once, without gradients.

Nothing is adapted below layer `n`, so the hidden states of a prompt are the same in every arm, at every
step and for every seed: they are computed once and stored.  The two parts together are the whole model.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache


@dataclass
class Prompts:
    """Prompts of equal length: their item indices, and the lower layers' hidden states and cache."""

    items: list[int]
    hidden: torch.Tensor  # (B, L, D)
    cache: DynamicCache  # of the lower layers


class Lower:
    def __init__(self, model, n):
        self.model = copy.copy(model.model)
        self.model._modules = model.model._modules | {
            "layers": model.model.layers[:n],
            "norm": nn.Identity(),
        }

    @torch.no_grad()
    def hidden(self, rows, batch_size=64):
        """[(L, D)]: hidden states of rows of token ids."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = [None] * len(rows)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in part], True)
            out = self.model(input_ids=ids, use_cache=False).last_hidden_state
            for i, h in zip(part, out):
                found[i] = h[: len(rows[i])].clone()
        return found

    @torch.no_grad()
    def prompts(self, rows, batch_size=64):
        """[Prompts]: rows grouped by length, so that no padding is needed."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = []
        for i in order:
            full = not found or len(found[-1]) == batch_size
            if full or len(rows[found[-1][0]]) != len(rows[i]):
                found.append([])
            found[-1].append(i)
        return [
            Prompts(items, *self._fill(torch.tensor([rows[i] for i in items]))) for items in found
        ]

    def _fill(self, ids):
        cache = DynamicCache()
        return self.step(ids, cache), cache

    def step(self, ids, cache):
        """ids (B, L) -> hidden states (B, L, D), appended to the cache."""
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state


def upper(model, n):
    """The layers from n on and the head, sharing the weights; takes inputs_embeds."""
    part = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    part.model.layers = part.model.layers[n:]
    for index, layer in enumerate(part.model.layers):
        layer.self_attn.layer_idx = index
    return part


@torch.no_grad()
def generate(lower, model, prompts, end, max_tokens, tell=lambda rows: None):
    """Greedy answers to Prompts: token ids (B, up to max_tokens), filled with `end` after an answer.

    tell(rows) is called with the rows of the prompts in the next forwards.
    """
    below, above = copy.deepcopy(prompts.cache), DynamicCache()
    hidden, answer = prompts.hidden, []
    alive = torch.arange(len(hidden))  # rows whose answer has not ended; only these are computed
    for _ in range(max_tokens):
        tell(alive)
        out = model.model(inputs_embeds=hidden, past_key_values=above, use_cache=True)
        token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        answer.append(torch.full((len(prompts.hidden),), end).index_copy(0, alive, token))
        rest = (token != end).nonzero()[:, 0]
        if not len(rest):
            break
        alive = alive[rest]
        for cache in (below, above):
            cache.batch_select_indices(rest)
        hidden = lower.step(token[rest, None], below)
    return torch.stack(answer, 1)
