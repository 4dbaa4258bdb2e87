"""C-LoRAE's script on tiny models and a few items in the layouts of the published data sets."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from examples.published import c_lorae, common, extraction_data, training
from examples.published.flan_t5 import System, measures
from lora_moe.methods import c_lorae as method
from lora_moe.methods.c_lorae import extraction
from lora_moe.methods.c_lorae.extraction import Entity, Event, Relation

from . import tiny

TWEET = "IMGID:{}\nRT\tO\nThe\tI-OTHER\nReeves\tI-OTHER\nin\tO\nNew\tB-LOC\nYork\tI-LOC\nOhio\tB-LOC\n\n"
PAIR = {
    "token": ["David", "Bowie", "at", "Earls", "Court"],
    "h": {"name": "David Bowie", "pos": [0, 2]},
    "t": {"name": "Earls Court", "pos": [3, 5]},
    "img_id": "a.jpg",
    "relation": "/per/loc/place_of_residence",
}
ATTACK = {
    "event_type": "Conflict:Attack",
    "trigger": {"text": "airstrike", "start": 0, "end": 1},
    "arguments": [{"role": "Place", "text": "Kobani", "start": 2, "end": 3}],
}
OTHER = {"event_type": "Business:Start-Org", "trigger": {"text": "founded"}, "arguments": []}


def sentence(number, *events):
    return {
        "sentence_id": f"VOA_{number}_0",
        "words": ["airstrike", "on", "Kobani"],
        "image": [f"VOA_{number}_1.jpg"],
        "golden-event-mentions": list(events),
    }


def write(data):
    """Six tweets and two pairs per split, twenty sentences, and images."""
    for split in ("train", "valid", "test"):
        (data / "twitter2015").mkdir(parents=True, exist_ok=True)
        text = "".join(TWEET.format(number) for number in range(7, 13))
        (data / "twitter2015" / f"{split}.txt").write_text(text)
    tiny.draw(data / "twitter2015_images/7.jpg", "red")
    for split in ("train", "val", "test"):
        (data / "mnre/txt").mkdir(parents=True, exist_ok=True)
        lines = [str(PAIR), str(PAIR | {"relation": "None"})]
        (data / "mnre/txt" / f"ours_{split}.txt").write_text("\n".join(lines))
        tiny.draw(data / "mnre/img_org" / split / "a.jpg", "blue")
    folder = data / "m2e2/m2e2_annotations"
    folder.mkdir(parents=True)
    (folder / "text_only_event.json").write_text(
        json.dumps([sentence(i, OTHER) for i in range(20)])
    )
    both = [sentence(i, ATTACK) for i in range(5, 20)]
    (folder / "text_multimedia_event.json").write_text(json.dumps(both))
    for i in range(20):
        tiny.draw(data / f"m2e2/m2e2_rawdata/image/image/VOA_{i}_1.jpg", "green")
    return data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c_lorae")
    return {
        "data": write(folder / "data"),
        "model": tiny.flan_t5(folder / "t5"),
        "vision": tiny.clip(folder / "clip"),
    }


def command(place, out, *more):
    sizes = ("--batch-size=6", "--limit=4", "--steps=3", "--visual-layers=1", "--answer-length=4")
    named = [f"--{name}={path}" for name, path in place.items()]
    sets = ("--datasets", "twitter2015", "mnre", "m2e2")
    return [*named, f"--out={out}", "--workers=0", "--rate=3e-2", *sizes, *sets, *more]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """(folder, scores) of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    return out, c_lorae.main(command(place, out))


def test_items_match_the_files(place):
    tweets = extraction_data.twitter(place["data"], "twitter2015")
    item = tweets.train[0]
    places = {Entity("location", "New York"), Entity("location", "Ohio")}
    assert item.records == {Entity("miscellaneous", "The Reeves"), *places}
    assert (item.text, item.image.name) == ("RT The Reeves in New York Ohio", "7.jpg")
    assert tweets.train[1].image is None  # some tweets have no image
    pairs = extraction_data.mnre(place["data"])
    relation = Relation(PAIR["relation"], "David Bowie", "Earls Court")
    assert [item.records for item in pairs.test] == [{relation}, frozenset()]
    assert pairs.test[0].text == "David Bowie at Earls Court Head: David Bowie. Tail: Earls Court."
    events = extraction_data.m2e2(place["data"])
    sizes = [len(split) for split in events[2:]]
    assert sum(sizes) == 20 and min(sizes) > 0  # the sentences of both files are merged
    attack = Event("attack", "airstrike", frozenset({("place", "Kobani")}))
    found = [item.records for split in events[2:] for item in split]
    assert found.count({attack}) == 15 and found.count(frozenset()) == 5


def test_ace_is_the_training_set_of_events_if_present(tmp_path, place):
    (tmp_path / "m2e2").symlink_to(place["data"] / "m2e2")
    (tmp_path / "ace").mkdir()
    for name in ("train.json", "dev.json"):
        (tmp_path / "ace" / name).write_text(json.dumps([sentence(0, ATTACK) | {"image": []}]))
    found = extraction_data.m2e2(tmp_path)
    assert [len(split) for split in found[2:]] == [1, 1, 20]
    assert found.train[0].image is None


def test_answers_read_back_as_written(place):
    for name in ("twitter2015", "mnre", "m2e2"):
        found = extraction_data.READ[name](place["data"])
        for item in found.train:
            answer = extraction.write(found.schema, item.records)
            assert extraction.read(found.schema, answer).records == item.records


def test_measures_by_hand():
    schema = extraction.Schema("events", "events", ("attack", "meet"), ("place", "target"))
    wanted = [frozenset({Event("attack", "bombed", frozenset({("place", "x"), ("target", "y")}))})]
    said = [extraction.read(schema, "attack: bombed | place = x; meet: met | place = x")]
    found = measures(schema, said, wanted)  # one of two triggers and one of two arguments
    assert found == pytest.approx({"trigger f1": 2 / 3, "argument f1": 1 / 2})
    schema = extraction.Schema("entities", "entities", ("person",))
    said = [
        extraction.read(schema, "person: Ada; person: Bob; Eve"),
        extraction.read(schema, "none"),
    ]
    wanted = [frozenset({Entity("person", "Ada")}), frozenset({Entity("person", "Carl")})]
    assert measures(schema, said, wanted)["f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (5 / 6))


def test_trains_saves_and_reads_back(place, whole):
    out, found = whole
    assert found["loss"][-1] < found["loss"][0] and all(map(math.isfinite, found["loss"]))
    args = c_lorae.arguments(command(place, out))
    sets = {name: extraction_data.READ[name](args.data).first(4) for name in args.datasets}
    system = System(args, sets)
    untrained = system.ask("test")
    method.load(system.model, out)
    said = json.loads((out / "answers.json").read_text())
    assert untrained != system.ask("test") == said
    assert system.scores("test", said) == found["test"]
    assert json.loads((out / "scores.json").read_text()) == found
    for layer in method.layers_of(system.model).values():
        rows = layer.lora_B.split(layer.config.ranks)
        assert len(rows) == 4 and all(expert.abs().max() > 0 for expert in rows)


def stop_in_call(patch, number):
    """Makes the number-th call of System.losses end the run."""
    losses, calls = System.losses, []

    def stop(self, batch):
        calls.append(batch)
        if len(calls) == number:
            raise KeyboardInterrupt
        return losses(self, batch)

    patch.setattr(System, "losses", stop)


def test_potentials_weigh_the_tasks_over_a_stop(place, tmp_path, monkeypatch):
    potentials = {"mner": 0.5, "mre": 0.4, "mee": 0.3}
    for task, value in potentials.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "scores.json").write_text(json.dumps({"achieved": {task: value}}))
    folders = [str(tmp_path / task) for task in potentials]
    monkeypatch.setattr(System, "achieved", lambda self: {"mner": 0.5, "mre": 0.2, "mee": 0.0})
    more = ["--potentials", *folders, "--evaluate-every=1", "--save-every=1", "--steps=2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_call(patch, 2)
        c_lorae.main(command(place, tmp_path / "out", *more))
    found = c_lorae.main(command(place, tmp_path / "out", *more))
    missing = [1 - 0.5 / 0.525, 1 - 0.2 / 0.42, 1]  # relative to the potentials plus 5 %
    weights = torch.tensor(missing).square().softmax(0)
    assert list(found["weights"].values()) == pytest.approx(weights.tolist())
    told = r"potentials: expected .*'mee', 'mner', 'mre'.*got .*'mner'"
    with pytest.raises(SystemExit, match=told):
        c_lorae.main(command(place, tmp_path / "out", "--potentials", folders[0]))


def test_a_bf16_model_has_fp32_adapters(place, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "device_and_dtype", lambda: ("cpu", torch.bfloat16))
    c_lorae.main(command(place, tmp_path, "--steps=2", "--workers=1"))
    tensors = load_file(tmp_path / method.FILE_NAME)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert max(t.abs().max() for name, t in tensors.items() if name.endswith("lora_B")) > 0


def test_one_task_alone_has_a_universal_expert_only(place, tmp_path):
    found = c_lorae.main(command(place, tmp_path, "--datasets", "mnre", "--steps=1"))
    assert list(found["achieved"]) == ["mre"]


def test_a_stopped_run_resumes_with_the_same_result(place, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_call(patch, 3)
        c_lorae.main(command(place, tmp_path, "--save-every=2"))
    assert training.newest(tmp_path).name == "checkpoint-2"
    assert c_lorae.main(command(place, tmp_path)) == whole[1]
    with pytest.raises(SystemExit, match=r"expected a checkpoint of .*'batch_size': 2"):
        c_lorae.main(command(place, tmp_path, "--batch-size=2"))


def damage(data, name, text):
    path = data / name
    path.unlink() if text is None else path.write_text(text)


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("twitter2015/train.txt", None, "train.txt is missing: expected tweets .*jefferyYu/UMT"),
        ("twitter2015/valid.txt", "RT\tO\n", "valid.txt: expected IMGID: and lines of word"),
        ("twitter2015/valid.txt", "IMGID:1\nRT\tB-GPE\n", r"valid.txt: expected tags of .*'B-GPE'"),
        ("mnre/txt/ours_val.txt", "{'token': [}", "ours_val.txt, line 1: expected a dict"),
        (
            "mnre/txt/ours_val.txt",
            "{'token': ['a']}",
            "ours_val.txt: expected the field 'relation'",
        ),
        ("mnre/img_org/test/a.jpg", None, "img_org/test: expected the images of 2 texts"),
        ("m2e2/m2e2_annotations/text_only_event.json", "[", "event.json: expected JSON"),
        ("m2e2/m2e2_annotations/text_only_event.json", "[{}]", "expected the field 'words'"),
    ],
)
def test_broken_data_is_reported_in_one_line(tmp_path, name, text, told):
    damage(write(tmp_path), name, text)
    with pytest.raises(SystemExit, match=told) as end:
        extraction_data.READ[name.partition("/")[0]](tmp_path)
    assert "\n" not in str(end.value)
