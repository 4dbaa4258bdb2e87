"""The kaomoji that can be drawn here, and their labels in the data set.

A kaomoji is kept if it has an emotion, is not marked as verbose, the font Noto Sans CJK has all its
characters in Unicode's compatible form, and its duplicates agree.  A label of the data set comes with
its synonyms (kiss, kissing, smooch); SETS has the first of each kind that at least 50 kaomoji have.
Those with neither an intent nor a subject are subsampled to the number of the others.
"""

import gzip
import json
import random
import re
import unicodedata

from examples.mmolre.features import charmap, package

EMOTIONS = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
SETS = {
    "intent": (
        *("greeting", "encourage", "goodbye", "apology", "pointing", "kiss"),
        *("celebrate", "shrug", "tease", "table flip", "wink", "thanks"),
    ),
    "subject": ("animal", "sparkle", "heart", "food", "music", "cat", "weapon", "dance"),
}
MOST_GLYPHS = 16
BROWS = "\N{ACUTE ACCENT}\N{DIAERESIS}\N{MACRON}"
ENOUGH = 2  # emotion words that must be in the lexicon


def drawable():
    """{kaomoji in compatible form: {emotion, intent, subject: English words}}"""
    have, readings = charmap(), {}
    for row in _rows():
        text = plain(row["text"])
        fits = 3 <= len(text) <= MOST_GLYPHS and have.issuperset(text)
        if fits and not any(map(unicodedata.combining, text)):
            readings.setdefault(text, []).append({name: row[name] for name in ("emotion", *SETS)})
    alike = {t: found[0] for t, found in readings.items() if all(r == found[0] for r in found)}
    labeled = {t for t, r in alike.items() if any(set(r[n]) & set(of) for n, of in SETS.items())}
    others = random.Random(0).sample(sorted(alike.keys() - labeled), len(labeled))
    return {text: alike[text] for text in sorted(labeled.union(others))}


def _rows():
    path = package("kaomoji_dataset") / "data/kaomoji.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row["emotion"] and row["tier"] != "verbose"]


def plain(text):
    """Unicode's compatible form without spaces; accents that serve as eyebrows are unchanged."""
    kept = (c if c in BROWS else unicodedata.normalize("NFKC", c) for c in text)
    return "".join("".join(kept).split()).replace("・", "·")


def face_of(text):
    """The face that near-duplicates share: the longest part in brackets, without sweat or blush marks."""
    inside = re.findall(r"\(([^()]+)\)", text) or [text]
    return max(inside, key=len).strip("*~.'\"#+;:,") or text


def meaning(lexicon, words):
    """(polarity, emotions (6,)) of a kaomoji's emotion words."""
    known = [lexicon[word] for word in words if word in lexicon]
    if len(known) < ENOUGH:
        return 0.0, [0.0] * len(EMOTIONS)
    share = [sum(emotion in tags for tags in known) / len(known) for emotion in EMOTIONS]
    return sum(map(polarity, known)) / len(known), [float(s > 0.5) for s in share]


def polarity(tags):
    return ("positive" in tags) - ("negative" in tags)


def picked(words, labels):
    """For each label, 1 if the words have it, otherwise 0; all NaN (missing) if they have none."""
    there = [float(label in words) for label in labels]
    return there if any(there) else [float("nan")] * len(labels)
