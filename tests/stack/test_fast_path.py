"""Every layer takes the fast path for every token of generate, and never in training."""

from __future__ import annotations

from unittest import mock

import pytest

from lora_moe import backend_info, fast_path, injected

from ..support.models import tiny

pytestmark = pytest.mark.skipif(
    backend_info()["serving"]["cpu"] != "cpp", reason="leads to the C++ operators"
)


def taken(run):
    """(number of layer calls in run() that took the fast path, number of those that did not)."""
    found, routed_lora = [], fast_path.routed_lora

    def counting(*args):
        done = routed_lora(*args)
        found.append(done is not None)
        return done

    with mock.patch.object(fast_path, "routed_lora", counting):
        run()
    return found.count(True), found.count(False)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("options", [{}, {"gate": "sigmoid"}, {"r": [1, 2, 3, 4]}], ids=str)
def test_each_layer_takes_it_for_each_token(tokens, options):
    model = tiny.model(trained=True, **options).eval()
    prompt = tiny.sequences(1)[0]["input_ids"][None]
    # the first token comes from the forward of the prompt, which takes it as well
    made = taken(lambda: model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens))
    assert made == (tokens * len(injected(model)), 0)


def test_training_does_not_take_it():
    model, batch = tiny.model(trained=True), tiny.sequences(1)[0]
    batch = {name: row[None] for name, row in batch.items()}
    assert taken(lambda: model(**batch).loss.backward()) == (0, len(injected(model)))
