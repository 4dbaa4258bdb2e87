"""Kaomoji as pictures with words, and three sets to extract from each: emotion, intent, subject.

    (≧▽≦)ﾉ ヤッホー☆      picture: one cell per character    text: "yatuho"
                          emotion: happy      intent: greeting      subject: sparkle

The picture is what a terminal would draw: each character in a cell of 16 x 16 pixels.  The text is what
can be read aloud: kana in Latin letters, and Latin words.  Names and keywords are not used, since they
paraphrase the labels.  If a Latin word in the drawing is itself a label or a synonym of one, the item is
left out.

A family of near-duplicates (the same face with other hands, or the same characters in another order)
is on one side of the split, for all three tasks.
"""

import gzip
import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from examples.kaomoji.pictures import CELLS, drawable
from lora_moe.methods.c_lorae.extraction import Schema, write

LABELS = {
    "emotion": "happy angry surprised sad shy sleepy cool cute doubt excited dissatisfied love confused"
    " laugh scared crying indifferent hurt thinking panic",
    "intent": "greeting encourage goodbye thanks pointing celebrate apology kiss shrug tease wink hug",
    "subject": "sparkle device food animal writing heart dance weapon cat music bear bunny pig fish dog"
    " bird drink magic",
}
SCHEMAS = [Schema("labels", name, tuple(labels.split())) for name, labels in LABELS.items()]
CAP = 0.1  # maximum share of a split with the same set ("happy" alone would be half of all)
SOURCE = (
    "kaomoji-dataset, CC BY 4.0, fontvibe.ai/tools/kaomoji, from the package kaomoji-dataset; drawn with"
    " Noto Sans CJK (SIL OFL)."
)


@dataclass(frozen=True)
class Item:
    drawing: str  # (up to CELLS characters)
    text: str
    wanted: frozenset
    answer: str


@dataclass(frozen=True)
class Splits:
    train: list[Item]
    validation: list[Item]
    heldout: list[Item]


def load(train, validation, heldout):
    """[Splits] of the three tasks; `train` has one size per task, the other sizes apply to all tasks."""
    entries = [(row, drawing) for row in _rows() if (drawing := _drawing(row["text"]))]
    family = _families([drawing for _, drawing in entries])
    # a tenth of the families for validation, a quarter held out, by a hash, independent of seeds
    side = [_digest(family[drawing]) % 20 for _, drawing in entries]
    found = []
    for schema, size in zip(SCHEMAS, train, strict=True):
        parts = [[], [], []]
        for (row, drawing), number in zip(entries, side):
            wanted = frozenset(row[schema.name]) & frozenset(schema.types)
            if wanted and not _tells(drawing, row):
                item = Item(drawing, _spoken(drawing), wanted, write(schema, wanted))
                parts[1 if number < 2 else 2 if number < 7 else 0].append(item)
        sizes = (size, validation, heldout)
        found.append(Splits(*(_pick(part, n) for part, n in zip(parts, sizes))))
    return found


def _rows():
    spec = find_spec("kaomoji_dataset")
    if spec is None:
        raise SystemExit("the data is missing: pip install --no-deps kaomoji-dataset")
    path = Path(spec.submodule_search_locations[0]) / "data" / "kaomoji.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _drawing(text):
    """The characters to draw, or None if the font lacks one or there are too many."""
    text = " ".join(text.split())
    return text if len(text) <= CELLS and set(text) <= drawable() else None


def _spoken(drawing):
    """Words of at least two characters: kana by their Unicode names, Latin letters as they are."""
    words = re.findall(r"[^\W\d_]{2,}", unicodedata.normalize("NFKC", drawing))
    return " ".join(filter(None, ("".join(map(_sound, word)) for word in words)))


def _sound(character):
    name = unicodedata.name(character, "")
    kana = re.fullmatch(r"(?:HIRAGANA|KATAKANA) LETTER (?:SMALL )?(\w+)", name)
    return kana[1].lower() if kana else character.lower() if name.startswith("LATIN") else ""


def _tells(drawing, row):
    """Whether a Latin word in the drawing is a label or a synonym of one."""
    words = set(re.findall("[a-z]{2,}", unicodedata.normalize("NFKC", drawing).lower()))
    said = " ".join((*row["emotion"], *row["intent"], *row["subject"], *row["names"].values()))
    return not words.isdisjoint(re.findall("[a-z]{2,}", said.lower()))


def _families(drawings):
    """{drawing: family}: the same face, or the same characters in any order and number."""
    parent = {}

    def root(key):
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    def characters(plain):
        return "characters " + "".join(sorted(set(plain)))

    plain = {d: "".join(unicodedata.normalize("NFKC", d).split()) for d in drawings}
    for text in plain.values():
        face = re.search(r"[(\[{].*[)\]}]", text)
        parent[root(characters(text))] = root("face " + (face[0] if face else text))
    return {drawing: root(characters(text)) for drawing, text in plain.items()}


def nearly_equal(items, others):
    """Share of the items whose drawing is one insertion, deletion or substitution away from another's."""

    def shortened(drawing):
        return {drawing} | {drawing[:i] + drawing[i + 1 :] for i in range(len(drawing))}

    known = set().union(*(shortened(item.drawing) for item in others))
    return float(np.mean([not known.isdisjoint(shortened(item.drawing)) for item in items]))


def _pick(items, size):
    """`size` items, ordered by a hash; at most a share CAP of them has the same set."""
    seen, picked = Counter(), []
    for item in sorted(items, key=lambda item: _digest(item.drawing)):
        if len(picked) < size and seen[item.wanted] < max(CAP * size, 1):
            seen[item.wanted] += 1
            picked.append(item)
    return picked


def _digest(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
