"""The training of MMoLRE's example: its data, its losses, and the step that it keeps."""

import math

import pytest
import torch

from examples.mmolre import data
from examples.mmolre.arms import OURS, TASKS, build
from examples.mmolre.losses import constants, forward, item_losses, normalized, scales, spread
from examples.mmolre.training import train

SCALE = dict.fromkeys(TASKS, 1.0)


def test_splits_hold_out_words_by_root_and_kaomoji_by_face(parts):
    from examples.common.tasks import root_of

    words, kaomoji = parts
    roots = root_of(words.names)
    for parts, family in ((words, roots.get), (kaomoji, data.face_of)):
        families = {s: {family(parts.names[i]) for i in ids} for s, ids in parts.split.items()}
        assert all(families.values())
        assert not families["train"] & families["test"]
        assert not families["train"] & families["validation"]
        assert not families["validation"] & families["test"]
        assert sum(map(len, parts.split.values())) == len(parts.names)
    items = data.held_out(words, kaomoji, "test", 1000)
    rows = items.features["text"][items.masks["text"]]
    assert len(rows.unique(dim=0)) == len(rows)  # no word is in two items
    assert 0 < items.labels["subject"].isnan().any(1).sum() < len(items.labels["subject"])


def test_items_are_put_together_as_described(parts):
    words, kaomoji = parts
    items = data.compose(words, kaomoji, [[3, 8], [5, 1]], [7, 4])
    for row, (pair, face) in enumerate((([3, 8], 7), ([5, 1], 4))):
        text = torch.cat([words.states[w][words.mask[w]] for w in pair])
        assert torch.equal(items.features["text"][row, : len(text)], text)
        drawn = kaomoji.states[face][kaomoji.mask[face]]
        assert torch.equal(items.features["image"][row, : len(drawn)], drawn)
        for name, states in (("text", text), ("image", drawn)):
            mask = items.masks[name]
            assert mask[row].tolist() == [i < len(states) for i in range(mask.shape[1])]
        score = sum(float(words.polarity[w]) for w in pair) + float(kaomoji.polarity[face])
        assert float(items.labels["sentiment"][row]) == pytest.approx(score)
        assert (
            items.masks["text"].any(0).all() and items.masks["image"].any(0).all()
        )  # no unneeded padding
        either = [max(*words.emotions[pair, e], kaomoji.emotions[face, e]) for e in range(6)]
        assert items.labels["emotion"][row].tolist() == either
        for name, of in kaomoji.sets.items():
            torch.testing.assert_close(items.labels[name][row], of[face], equal_nan=True)


def test_meaning_of_a_kaomoji_by_hand():
    lexicon = {
        "glad": ["joy", "positive"],
        "smile": ["joy", "positive", "surprise"],
        "mad": ["anger", "fear", "negative"],
        "neutral": ["trust"],
    }
    joy, nothing = [1.0, 0, 0, 0, 0, 0], [0.0] * 6
    assert data.meaning(lexicon, ["glad", "smile", "unheard of"]) == (1.0, joy)
    assert data.meaning(lexicon, ["glad", "smile", "mad"]) == (pytest.approx(1 / 3), joy)
    assert data.meaning(lexicon, ["glad", "mad", "neutral", "smile"]) == (0.25, nothing)
    assert data.meaning(lexicon, ["glad", "unheard of"]) == (0.0, nothing)
    assert data.picked(["cat", "kitty", "animal"], ["dog", "cat", "animal"]) == [0, 1, 1]
    assert all(map(math.isnan, data.picked(["creature"], ["dog", "cat"])))


def test_a_constant_predictor_has_loss_1(parts):
    labels = data.training_labels(*parts)
    constant, scale = constants(labels), scales(labels)
    share = labels["intent"][~labels["intent"].isnan().any(1)].mean(0)
    torch.testing.assert_close(constant["intent"].sigmoid(), share)
    assert float(constant["sentiment"]) == float(labels["sentiment"].median())

    def mean_losses(by=0.0):
        outputs = spread({name: of + by for name, of in constant.items()}, labels)
        found = item_losses(outputs, labels)
        return {name: float(of.nanmean()) / scale[name] for name, of in found.items()}

    assert mean_losses() == pytest.approx(dict.fromkeys(scale, 1.0))
    assert all(loss > 1 for by in (-0.3, 0.3) for loss in mean_losses(by).values())


def test_the_training_loss_is_the_mean_of_the_evaluated_losses(parts):
    items, model = data.held_out(*parts, "test", 40), build(OURS).eval()
    each = item_losses(forward(model, items), items.labels)
    scale = dict(zip(TASKS, (1.0, 2.0, 3.0, 4.0)))
    for name, loss in normalized(model, items, scale).items():
        torch.testing.assert_close(loss, each[name].nanmean() / scale[name])


def test_items_without_labels_train_nothing(parts):
    (batch,) = data.training(*parts, 1, 8, 0)
    for of in batch.labels.values():
        of.fill_(torch.nan)
    model, _ = trained([batch] * 3, data.held_out(*parts, "validation", 20))
    torch.manual_seed(0)
    for name, initial in build(OURS).named_parameters():  # only weight decay changes them
        torch.testing.assert_close(model.get_parameter(name), initial, rtol=1e-4, atol=0)


def test_the_step_with_the_best_validation_loss_is_kept(parts):
    validation = data.held_out(*parts, "validation", 20)
    batches = [*data.training(*parts, 12, 4, 0)]
    batches[8:] = [wrong(batch) for batch in batches[8:]]  # the loss rises from here on
    model, happened = trained(batches, validation)
    means = {step: sum(losses.values()) / 4 for step, losses in happened["validation"]}
    assert list(means) == list(range(1, 13))
    assert happened["step"] == min(means, key=means.get) < 12
    with torch.no_grad():
        again = {name: float(of) for name, of in normalized(model, validation, SCALE).items()}
    assert again == pytest.approx(dict(happened["validation"])[happened["step"]])


def trained(batches, validation):
    return train(lambda: build(OURS), batches, 12, 2e-3, 0, SCALE, validation)


def wrong(items):
    labels = {n: 3 - of if n == "sentiment" else 1 - of for n, of in items.labels.items()}
    return type(items)(items.features, items.masks, labels)
