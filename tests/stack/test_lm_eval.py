"""lm-evaluation-harness: scores and answers of a routed adapter do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from lora_moe import LoraMoeConfig, disable_adapters, inject
from lora_moe.routers import SequenceRouter

pytest.importorskip("lm_eval", reason="pip install lm-eval: it brings 30 packages")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ..support.models import tiny

CONTEXTS = ["the cat", "a big dog sees the small red", "bird", "the tree and the house or", "not a"]
SCORED = [(text, " likes the bird" if i % 2 else " today") for i, text in enumerate(CONTEXTS)]
ASKED = [(text, {"until": ["today"], "max_gen_toks": 6, "do_sample": False}) for text in CONTEXTS]
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def model_of(**fields):
    config = LoraMoeConfig(**tiny.EXPERTS | {"target_modules": ["q_proj", "up_proj"]} | fields)
    model = inject(tiny.base(), config).eval()
    tiny.train_by_hand(model, std=1.0)
    return model


def answers(model, kind, arguments, batch_size):
    lm = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=batch_size)
    given = [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(arguments)
    ]
    return getattr(lm, kind)(given, disable_tqdm=True)


def scores(model, batch_size):
    found = answers(model, "loglikelihood", SCORED, batch_size)
    return torch.tensor([score for score, _ in found])


@torch.no_grad()
def own_scores(model):
    """Scores of each text alone, without the harness."""
    tokenizer, found = tiny.tokenizer(), []
    for context, continuation in SCORED:
        ids = torch.tensor([tokenizer(context + continuation, add_special_tokens=False).input_ids])
        first = len(tokenizer(context, add_special_tokens=False).input_ids)
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1)[0, first - 1 :]
        found.append(logprobs.gather(1, ids[0, first:, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("gate", [{}, {"top_p": 0.6, "top_k": 4}], ids=["top-k", "top-p"])
def test_scores_do_not_depend_on_the_batch(gate):
    model = model_of(**gate)
    want = own_scores(model)
    for batch_size in (1, 2, len(SCORED)):
        torch.testing.assert_close(scores(model, batch_size), want, **NEAR)
    with disable_adapters(model):
        torch.testing.assert_close(scores(model, 2), own_scores(model), **NEAR)
        assert (own_scores(model) - want).abs().min() > 1e-3  # the experts affect the scores


def test_a_router_that_reads_the_whole_sequence_wants_a_batch_of_one():
    """The harness scores without an attention mask, so the mean includes padding (docs/recipes.md)."""
    model = model_of(router=SequenceRouter("mean"))
    want = own_scores(model)
    torch.testing.assert_close(scores(model, 1), want, **NEAR)
    assert (scores(model, len(SCORED)) - want).abs().max() > 1e-3


@pytest.mark.parametrize("router", [None, SequenceRouter("mean")], ids=["token", "sequence"])
def test_answers_do_not_depend_on_the_padding_on_the_left(router):
    model = model_of() if router is None else model_of(router=router)
    alone = answers(model, "generate_until", ASKED, 1)
    assert answers(model, "generate_until", ASKED, len(ASKED)) == alone
    tokenizer = tiny.tokenizer()
    for (context, _), answer in zip(ASKED, alone):
        ids = tokenizer(context, return_tensors="pt", add_special_tokens=False).input_ids
        made = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True)
        assert text.split("today")[0].split() == answer.split()
    with disable_adapters(model):
        assert answers(model, "generate_until", ASKED, 1) != alone
