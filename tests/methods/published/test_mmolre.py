"""MMoLRE's script on a few clips in MMSA's layout."""

from __future__ import annotations

import itertools
import json
import os
import pickle

import numpy as np
import pytest
import torch

from examples.published import affect_data, mmolre, training
from lora_moe.methods import mmolre as method
from lora_moe.methods.mmolre.affect import multilabel_metrics, sentiment_metrics

LENGTH, SIZES = 6, {"text": 8, "audio": 5, "vision": 3}


def split(count, seed):
    """Clips of unequal length, padded in front; the first text feature is the sentiment."""
    draw = np.random.default_rng(seed)
    labels = draw.uniform(-3, 3, count).astype(np.float32)
    lengths = draw.integers(2, LENGTH + 1, count)
    padding = np.arange(LENGTH) < LENGTH - lengths[:, None]
    features = {name: draw.normal(size=(count, LENGTH, D)) for name, D in SIZES.items()}
    features["text"][:, :, 0] = labels[:, None]
    for x in features.values():
        x[padding] = 0
    features["audio"][0, -1, 0] = -np.inf  # COVAREP's features contain -inf
    clips = [f"video{seed}$_${i}" for i in range(count)]
    mask = np.stack([0 * padding, ~padding, 0 * padding], 1).astype(np.float32)
    text = {"raw_text": np.array(clips), "id": np.array(clips, dtype=object), "text_bert": mask}
    return features | text | {"regression_labels": labels}


def write(folder):
    """A pickle, and tables with both kinds of emotions."""
    data = {"train": split(24, 0), "valid": split(8, 1), "test": split(8, 2)}
    path = folder / "aligned_50.pkl"
    path.write_bytes(pickle.dumps(data))
    rows = [
        (*clip.split("$_$"), y)
        for s in data.values()
        for clip, y in zip(s["id"], s["regression_labels"])
    ]
    many = ["file,index,sentiment," + ",".join(affect_data.EMOTIONS)]
    many += [f"{file},{i},{y},{max(y, 0)},{max(-y, 0)},0,0,0,0" for file, i, y in rows[1:]]
    (folder / "many.csv").write_text("\n".join(many))
    one = [",file,index,label2b,label6"]
    one += [f"0,{file},{i},{int(np.sign(y))},{int(y < 0)}" for file, i, y in rows[1:]]
    (folder / "one.csv").write_text("\n".join(one))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("mmolre"))


def command(data, out, *more):
    sizes = ("--width=8", "--rank=2", "--shared=2", "--batch-size=8", "--steps=20", "--rate=2e-2")
    emotions = f"--emotions={data.parent / 'many.csv'}"
    return [
        f"--data={data}",
        f"--out={out}",
        emotions,
        "--workers=0",
        "--evaluate-every=5",
        *sizes,
        *more,
    ]


def test_features_and_masks_match_the_file(data):
    found = affect_data.read(data, ["text", "audio"])
    train = pickle.loads(data.read_bytes())["train"]
    assert torch.equal(found["train"].masks["text"], torch.from_numpy(train["text_bert"][:, 1] > 0))
    assert torch.equal(found["train"].masks["audio"], found["train"].masks["text"])
    for name, x in found["train"].features.items():
        valid = x[found["train"].masks[name]]
        assert torch.allclose(valid.mean(0), torch.zeros(SIZES[name]), atol=1e-5)
        assert torch.allclose(valid.std(0), torch.ones(SIZES[name]), atol=1e-5)
        assert not x[~found["train"].masks[name]].any()
    assert found["test"].clips[3] == "video2$_$3"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_all_protocols_are_read(tmp_path, protocol):
    written = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.array(["x", None], dtype=object),
        "c": [1],
    }
    texts = [pickle.dumps(written, protocol)]
    if protocol < 4:  # later protocols store the lengths of names
        texts.append(texts[0].replace(b"numpy._core", b"numpy.core"))  # as written by numpy 1
    for text in texts:
        (tmp_path / "a.pkl").write_bytes(text)
        found = affect_data.unpickled(tmp_path / "a.pkl")
        assert np.array_equal(found["a"], written["a"]) and found["b"].tolist() == ["x", None]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_other_pickled_code_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"train": np.array([Harmful()], dtype=object)}))
    with pytest.raises(
        SystemExit, match=r"a.pkl: expected a pickle of numpy arrays alone, got .*mkdir"
    ):
        affect_data.read(tmp_path / "a.pkl", ["text"])
    assert not (tmp_path / "harm").exists()


def test_trains_saves_and_reads_back(data, tmp_path):
    found = mmolre.main(command(data, tmp_path))
    assert np.mean(found["loss"][-4:]) < 0.7 * np.mean(found["loss"][:4])
    assert found["test"]["sentiment"]["corr"] > 0.5
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    model = method.load(tmp_path / "mmolre.safetensors")
    split = affect_data.read(data, ["text", "audio"])["test"]
    out = model(split.features, split.masks)
    assert sentiment_metrics(out["sentiment"][:, 0], split.sentiment) == found["test"]["sentiment"]
    emotions = torch.zeros(8, 6)
    emotions[:, 0], emotions[:, 1] = split.sentiment > 0, split.sentiment < 0
    assert multilabel_metrics(out["emotion"], emotions) == found["test"]["emotion"]


def test_the_model_with_the_lowest_validation_loss_is_kept(data, tmp_path):
    more = ["--rate=1", "--evaluate-every=1"]  # the loss oscillates
    found = mmolre.main(command(data, tmp_path, *more))
    model, splits = method.load(tmp_path / mmolre.FILE), affect_data.read(data, ["text", "audio"])
    _, emotions = affect_data.emotions(data.parent / "many.csv", splits)
    valid = splits["valid"]
    labels = {"sentiment": valid.sentiment, "emotion": emotions["valid"]}
    loss = method.total_loss(model.config, model(valid.features, valid.masks), labels)
    assert loss.item() == pytest.approx(found["best"]["loss"]) and found["best"]["step"] < 20


def test_strongest_emotions_are_classes(data, tmp_path):
    table = data.parent / "one.csv"
    found = mmolre.main(command(data, tmp_path, f"--emotions={table}", "--steps=2"))
    assert found["test"]["emotion"].keys() == {"accuracy", "weighted_f1"}
    kind, labels = affect_data.emotions(table, affect_data.read(data, ["text"]))
    assert kind == "multiclass" and labels["train"][0] == -100  # the table lacks the first clip


def test_a_stopped_run_resumes_with_the_same_result(data, tmp_path, monkeypatch):
    whole = mmolre.main(command(data, tmp_path / "whole"))
    loss, calls = mmolre.Judge.loss, []

    def stop(self, batch):
        calls.append(batch)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mmolre.Judge, "loss", stop)
        mmolre.main(command(data, tmp_path / "parts", "--save-every=4"))
    assert training.newest(tmp_path / "parts").name == "checkpoint-12"
    assert mmolre.main(command(data, tmp_path / "parts", "--save-every=4")) == whole


def broken(change):
    data = {name: split(4, seed) for seed, name in enumerate(("train", "valid", "test"))}
    change(data)
    return data


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda d: d.pop("valid"), "expected the field 'valid'"),
        (lambda d: d["test"].pop("audio"), "expected the field 'audio'"),
        (lambda d: d["test"].pop("regression_labels"), "expected the field 'regression_labels'"),
        (
            lambda d: d["train"].update(text=np.zeros((4, 3))),
            r"'text' of shape \(N, L, D\), got \(4, 3\)",
        ),
        (lambda d: d["train"].update(id=["a"]), "expected as many labels, ids and features"),
    ],
)
def test_broken_data_is_reported_in_one_line(tmp_path, change, told):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(broken(change)))
    with pytest.raises(SystemExit, match=told) as end:
        affect_data.read(tmp_path / "a.pkl", ["text", "audio"])
    assert "\n" not in str(end.value)


def test_a_missing_file_and_tables_that_do_not_fit(data, tmp_path):
    with pytest.raises(SystemExit, match="is missing: expected a pickle in MMSA's layout, from"):
        affect_data.read(tmp_path / "aligned_50.pkl", ["text"])
    splits, table = affect_data.read(data, ["text"]), tmp_path / "a.csv"
    table.write_text("file,index,happy\nvideo0,0,1\n")
    with pytest.raises(SystemExit, match="expected the field 'label6'"):
        affect_data.emotions(table, splits)
    rows = [row.split(",") for row in (data.parent / "one.csv").read_text().splitlines()]
    shifted = rows[:1] + [[*a[:3], *b[3:]] for a, b in itertools.pairwise(rows[1:])]
    table.write_text("\n".join(map(",".join, shifted)))
    with pytest.raises(SystemExit, match="expected clips of the same sentiment in both files, got"):
        affect_data.emotions(table, splits)
