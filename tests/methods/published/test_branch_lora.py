"""BranchLoRA's script on a tiny LLaVA and a few questions in CoIN's layout."""

from __future__ import annotations

import json
import math

import pytest
import torch

from examples.published import branch_lora, coin_data, common, training
from examples.published.llava import PROJECTOR, System
from lora_moe.methods import branch_lora as method

from . import tiny

QUESTIONS = {
    "ScienceQA": ("Which?\nA. lake\nB. sea", "B"),
    "TextVQA": ("What does it say?", "stop"),
    "Grounding": ("Where is the cat?", "[0.10, 0.20, 0.50, 0.60]"),
}
TASKS = ("ScienceQA", "TextVQA")


def write(data, images):
    """Four training and two test questions for each of three tasks; one of ScienceQA's has no image."""
    for task, (text, answer) in QUESTIONS.items():
        image = f"{task}/a.png"
        tiny.draw(images / image, "red")
        said = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": answer}]
        train = [{"image": image, "conversations": said * (1 + i % 2)} for i in range(4)]
        key = "answer_bbox" if task == "Grounding" else "answer"
        test = [{"question_id": i, "image": image, "text": text, key: answer} for i in range(2)]
        if task == "ScienceQA":
            del train[0]["image"], test[0]["image"]
        (data / task).mkdir(parents=True)
        (data / task / "train.json").write_text(json.dumps(train))
        (data / task / ("val.json" if task == "TextVQA" else "test.json")).write_text(
            json.dumps(test)
        )
    notes = {"data": [{"question_id": i, "answers": ["stop"] * 10} for i in range(2)]}
    (images / coin_data.ANNOTATIONS).write_text(json.dumps(notes))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branch_lora")
    write(folder / "data", folder / "images")
    return {
        "data": folder / "data",
        "images": folder / "images",
        "model": tiny.llava(folder / "llava"),
    }


def command(place, out, *more):
    sizes = ("--batch-size=2", "--accumulate=2", "--steps=6", "--rate=3e-2", "--answer-length=3")
    named = [f"--{name}={path}" for name, path in place.items()]
    return [*named, f"--out={out}", "--workers=0", *sizes, "--tasks", *TASKS, *more]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """(folder, scores) of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    return out, branch_lora.main(command(place, out))


def test_trains_freezes_saves_and_reads_back(place, whole):
    out, found = whole
    for losses in found["loss"]:
        assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    assert found["accuracy"][0] == [1.0]
    assert json.loads((out / "scores.json").read_text()) == found
    args = branch_lora.arguments(command(place, out))
    system = System(args, out)
    tests = [coin_data.test_samples(args.data, args.images, task) for task in TASKS]
    again = [system.ask(number, samples) for number, samples in enumerate(tests)]
    said = json.loads((out / "answers.json").read_text())
    rows = (said.values(), found["accuracy"][-1], found["selector"][-1])
    assert list(map(list, zip(*again))) == list(map(list, rows))
    for layer in method.branch_layers(system.model).values():
        assert len(method.routers_of(layer)) == 2 and 2 <= len(layer.frozen) <= 4
        assert max(branch.abs().max() for branch in method.branches_of(layer)) > 0
    fresh = System(args, None).model.get_submodule(PROJECTOR)
    tuned = system.model.get_submodule(PROJECTOR)
    moved = [(a - b).abs().max() for a, b in zip(fresh.parameters(), tuned.parameters())]
    assert min(moved) > 0 and {p.dtype for p in tuned.parameters()} == {torch.float32}


def test_the_selector_finds_the_task_of_a_question(whole):
    assert whole[1]["selector"][-1] == [1.0, 1.0]  # each task has other words


def test_acc_maa_and_bwt(whole):
    (first,), (again, second) = whole[1]["accuracy"]
    assert whole[1]["acc"] == (again + second) / 2
    assert whole[1]["maa"] == (first + (again + second) / 2) / 2
    assert whole[1]["bwt"] == again - first


@pytest.mark.parametrize("call, kept", [(17, "checkpoint-2"), (13, None)], ids=["amid", "between"])
def test_a_stopped_run_resumes_with_the_same_result(
    place, whole, tmp_path, monkeypatch, call, kept
):
    """A step makes two calls and a task has six steps, so the run stops in the second task."""
    loss, calls = System.loss, []

    def stop(self, batch):
        calls.append(batch)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(System, "loss", stop)
        branch_lora.main(command(place, tmp_path, "--save-every=1"))
    folder = training.newest(tmp_path / "task-1")
    assert (folder and folder.name) == kept
    assert branch_lora.main(command(place, tmp_path)) == whole[1]


def test_labels_are_the_answers_and_their_ends(place, tmp_path):
    args = branch_lora.arguments(command(place, tmp_path))
    system = System(args, None)
    samples = coin_data.training_samples(args.data, args.images, "ScienceQA")
    assert samples[0].image is None and len(samples[1].turns) == 2
    batch = system.conversations(samples[:2])
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    asked = [row[row >= 0].tolist() for row in batch["labels"]]
    answer = [*system.conversations.plain("B"), system.conversations.tokenizer.eos_token_id]
    assert asked == [answer, answer * 2]
    images = (batch["input_ids"] == system.model.config.image_token_id).sum(1)
    assert images.tolist() == [0, 4]
    text = system.conversations.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<s>A chat between") and "USER: Which?" in text
    assert (
        batch["attention_mask"].sum(1)
        == torch.tensor(
            [
                len(batch["input_ids"][0]) - (batch["input_ids"][0] == 0).sum(),
                batch["input_ids"].shape[1],
            ]
        )
    ).all()


def test_the_loss_does_not_depend_on_padding(place, tmp_path):
    args = branch_lora.arguments(command(place, tmp_path))
    system = System(args, None)
    method.begin_task(system.model)
    samples = coin_data.training_samples(args.data, args.images, "ScienceQA")[:2]
    alone = [system.loss(system.conversations([sample])) for sample in samples]
    both = system.loss(system.conversations(samples))
    mean = (alone[0] * 2 + alone[1] * 4) / 6
    assert both.item() == pytest.approx(mean.item(), rel=1e-5)


def test_samples_without_their_image_are_left_out(place, capsys):
    path = place["data"] / "TextVQA/train.json"
    entries = json.loads(path.read_text())
    data = place["data"].parent / "more"
    (data / "TextVQA").mkdir(parents=True)
    (data / "TextVQA/train.json").write_text(
        json.dumps([{**entries[0], "image": "no.png"}, *entries])
    )
    assert len(coin_data.training_samples(data, place["images"], "TextVQA")) == 4
    assert capsys.readouterr().out == "1 of 5 skipped: their images are missing\n"


def test_a_bf16_model_has_fp32_adapters(place, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "device_and_dtype", lambda: ("cpu", torch.bfloat16))
    found = branch_lora.main(command(place, tmp_path, "--steps=2", "--workers=1"))
    assert all(losses[1] < losses[0] for losses in found["loss"])
    system = System(branch_lora.arguments(command(place, tmp_path)), tmp_path)
    assert {p.dtype for p in system.model.parameters() if p.requires_grad} == {torch.float32}
    assert system.model.get_input_embeddings().weight.dtype == torch.bfloat16


def sample(answer, answers=()):
    return coin_data.Sample((("q", answer),), None, answers)


@pytest.mark.parametrize(
    "task, said, wanted, share",
    [
        ("ScienceQA", "B. a sea", sample("B"), 1),
        ("ScienceQA", "The answer is C", sample("B"), 0),
        ("ImageNet", "a tabby cat", sample("tabby"), 1),
        ("ImageNet", "", sample("tabby"), 0),
        ("GQA", "Yes ", sample("yes"), 1),
        ("VQAv2", "no", sample("yes"), 0),
        ("Grounding", "[0.0, 0.0, 0.4, 0.4]", sample("[0.0, 0.0, 0.4, 0.6]"), 1),  # 2 / 3
        ("Grounding", "[0.0, 0.0, 0.4, 0.4]", sample("[0.2, 0.0, 0.6, 0.4]"), 0),  # 1 / 3
        ("Grounding", "on the left", sample("[0.2, 0.0, 0.6, 0.4]"), 0),
        # two of ten say so: of nine others, two agree eight times and one agrees twice
        ("TextVQA", "stop", sample("stop", ("stop",) * 2 + ("go",) * 8), (8 * 2 + 2) / 30),
        ("TextVQA", "stop", sample("stop", ("stop",) * 4 + ("go",) * 6), 1),
    ],
)
def test_right_answers(task, said, wanted, share):
    assert coin_data.right(task, said, wanted) == pytest.approx(share)


@pytest.mark.parametrize(
    "name, content, told",
    [
        (
            "data/GQA/train.json",
            None,
            r"GQA/train.json is missing: expected a list .*Zacks-Chen/CoIN",
        ),
        ("data/GQA/train.json", [{"image": "a"}], "train.json: expected the field 'conversations'"),
        ("data/GQA/train.json", [{"conversations": [{"from": "gpt"}]}], "turns of human and gpt"),
        ("data/GQA/test.json", [{"text": "q"}], "test.json: expected the field 'answer'"),
        (
            "data/GQA/test.json",
            [{"text": "q", "answer": "a", "image": "GQA/1.jpg"}],
            "images: expected GQA/1.jpg, from the sources",
        ),
    ],
)
def test_broken_data_is_reported_in_one_line(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / "data/GQA").mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(content))
    read = coin_data.training_samples if "train" in name else coin_data.test_samples
    with pytest.raises(SystemExit, match=told) as end:
        read(tmp_path / "data", tmp_path / "images", "GQA")
    assert "\n" not in str(end.value)
