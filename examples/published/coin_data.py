"""The eight tasks of CoIN in LLaVA's format, and the rules for scoring answers.

    DATA/TASK/train.json   [{"image": name, "conversations": [{"from": "human", "value": "<image>\\n..."},
                           {"from": "gpt", "value": ...}, ...]}, ...]; without "image": text alone
    DATA/TASK/test.json    [{"question_id", "image", "text", "answer"}, ...], or val.json;
                           Grounding has "answer_bbox", "[x0, y0, x1, y1]", in place of "answer"
    IMAGES/name            COCO2014, GQA, ImageNet_withlabel, OCR-VQA, ScienceQA, TextVQA, VizWiz
    IMAGES/TextVQA/TextVQA_0.5.1_val.json      {"data": [{"question_id", "answers": [10]}, ...]}

Described in github.com/zackschen/CoIN (README; ETrain/Dataset/LLaVA/llava_dataset.py; scripts/CoIN);
files: huggingface.co/datasets/Zacks-Chen/CoIN.  The metrics are those of its ETrain/Eval/LLaVA/CoIN.
"""

import re
from pathlib import Path
from typing import NamedTuple

from examples.published.common import expect, field, read_json

TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")
SOURCE = "huggingface.co/datasets/Zacks-Chen/CoIN"
IMAGE = "<image>"
IMAGES = "the sources that github.com/zackschen/CoIN names"
ANNOTATIONS = "TextVQA/TextVQA_0.5.1_val.json"


class Sample(NamedTuple):
    turns: tuple[tuple[str, str], ...]  # (question, answer); the first question names the image
    image: Path | None
    answers: tuple[str, ...] = ()  # if there are several


def training_samples(data, images, task):
    path = expect(data / task / "train.json", "a list of conversations", SOURCE)
    return with_images([conversation(entry, images, path) for entry in read_json(path)], images)


def test_samples(data, images, task):
    paths = [data / task / f"{split}.json" for split in ("test", "val")]
    path = paths[paths[1].exists() and not paths[0].exists()]
    entries = read_json(expect(path, "a list of text and answer", SOURCE))
    samples = [question(entry, images, path, task) for entry in entries]
    if task == "TextVQA":
        notes = read_json(expect(images / ANNOTATIONS, "ten answers a question", "textvqa.org"))
        given = {str(note["question_id"]): note["answers"] for note in field(notes, "data", images)}
        keys = [str(field(entry, "question_id", path)) for entry in entries]
        answers = [tuple(field(given, key, images / ANNOTATIONS)) for key in keys]
        samples = [s._replace(answers=a) for s, a in zip(samples, answers)]
    return with_images(samples, images)


def conversation(entry, images, path):
    turns = field(entry, "conversations", path)
    speakers = [turn.get("from") for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise SystemExit(f"{path}: expected turns of human and gpt in turn, got {speakers}")
    values = [field(turn, "value", path).replace(IMAGE, "").strip() for turn in turns]
    return sample(tuple(zip(values[::2], values[1::2])), entry.get("image"), images)


def question(entry, images, path, task):
    if "conversations" in entry:
        return conversation(entry, images, path)
    answer = field(entry, "answer_bbox" if task == "Grounding" else "answer", path)
    text = field(entry, "text", path).replace(IMAGE, "").strip()
    return sample(((text, str(answer)),), entry.get("image"), images)


def sample(turns, image, images):
    if image is None:
        return Sample(turns, None)
    (first, answer), *rest = turns
    return Sample(((f"{IMAGE}\n{first}", answer), *rest), images / image)


def with_images(samples, images):
    """The samples whose images exist: some are no longer available, but SystemExit if all are missing."""
    there = [s for s in samples if s.image is None or s.image.is_file()]
    if samples and not there:
        raise SystemExit(
            f"{images}: expected {samples[0].image.relative_to(images)}, from {IMAGES}"
        )
    if len(there) < len(samples):
        print(f"{len(samples) - len(there)} of {len(samples)} skipped: their images are missing")
    return there


def right(task, said, sample):
    """Score of an answer in [0, 1], as in CoIN's scripts."""
    wanted = sample.turns[-1][1]
    if task == "ScienceQA":
        return float(letter(said) == letter(wanted))
    if task == "ImageNet":
        return float(wanted in said or (said in wanted and bool(said)))
    if task == "Grounding":
        return float(overlap(box(said), box(wanted)) > 0.5)
    if sample.answers:
        return agreement(said, sample.answers)
    return float(said.strip().lower() == wanted.strip().lower())


def letter(text):
    """The first single-letter word, such as B in "B. a lake"; None if there is none."""
    found = re.search(r"\b(\w)\b", text)
    return found.group(1).upper() if found else None


def box(text):
    """The four numbers of a box in the text, or None."""
    numbers = [float(n) for n in re.findall(r"\d*\.?\d+", text)]
    return numbers if len(numbers) == 4 else None


def overlap(a, b):
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    if a is None or b is None:
        return 0.0
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    common = sides[0] * sides[1]
    union = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)) - common
    return common / union if union > 0 else 0.0


def agreement(said, answers):
    """VQA accuracy: min(1, n / 3) for n equal answers, averaged over leaving out each annotator."""
    equal = [answer.strip().lower() == said.strip().lower().rstrip(".") for answer in answers]
    return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(equal)
