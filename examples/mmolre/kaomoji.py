"""The kaomoji that can be drawn here, and what the data set's labels say of each.

Only kaomoji are kept whose characters, in Unicode's compatible form, the font DejaVu Sans has, which
have an emotion, and whose duplicates agree.  A label of the data set comes with its synonyms (kiss,
kissing, smooch); SETS has the first of each kind that at least 30 kaomoji here have.
"""

import gzip
import json
import re
import unicodedata

from examples.mmolre.features import charmap, package

EMOTIONS = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
SETS = {
    "intent": (
        *("greeting", "kiss", "encourage", "shrug", "pointing"),
        *("wink", "goodbye", "tease", "celebrate"),
    ),
    "subject": ("animal", "heart", "sparkle", "music", "cat", "flower", "bunny"),
}
MOST_GLYPHS = 16
BROWS = "\N{ACUTE ACCENT}\N{DIAERESIS}\N{MACRON}"
ENOUGH = 2  # emotion words that the lexicon must know


def drawable():
    """{kaomoji in compatible form: {emotion, intent, subject: English words}}"""
    have, readings = charmap(), {}
    with gzip.open(
        package("kaomoji_dataset") / "data/kaomoji.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        for row in map(json.loads, file):
            text = plain(row["text"])
            fits = 3 <= len(text) <= MOST_GLYPHS and have.issuperset(text)
            if fits and row["emotion"] and not any(map(unicodedata.combining, text)):
                reading = {name: row[name] for name in ("emotion", *SETS)}
                readings.setdefault(text, []).append(reading)
    alike = (text for text, found in readings.items() if all(r == found[0] for r in found))
    return {text: readings[text][0] for text in sorted(alike)}


def plain(text):
    """Unicode's compatible form without spaces; the accents that serve as brows stay as they are."""
    kept = (c if c in BROWS else unicodedata.normalize("NFKC", c) for c in text)
    return "".join("".join(kept).split()).replace("・", "·")


def face_of(text):
    """What near-duplicates share: the longest part in brackets, without sweat and blush at its ends."""
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
    """Of each label, 1 where the words have it, else 0; all NaN (missing) where they have none."""
    there = [float(label in words) for label in labels]
    return there if any(there) else [float("nan")] * len(labels)
