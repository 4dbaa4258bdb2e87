"""Twitter-15 and -17 (entities), MNRE-2 (relations) and M2E2 (events), in their published formats.

    DATA/twitter2015/{train,valid,test}.txt    "IMGID:" and a number, then a word, a tab and its BIO tag
    DATA/twitter2015_images/NUMBER.jpg         a line; a blank line between tweets
    DATA/twitter2017, DATA/twitter2017_images  the same; all: github.com/jefferyYu/UMT (README, data/)
    DATA/mnre/txt/ours_{train,val,test}.txt    a Python dict a line: token, h, t, img_id, relation
    DATA/mnre/img_org/{train,val,test}/        github.com/thecharm/MNRE; file names as in
                                               github.com/zjunlp/MKGformer (MRE/run.py)
    DATA/m2e2/m2e2_annotations/text_only_event.json, text_multimedia_event.json
                                               lists of: sentence_id, words, image (a list of names),
                                               golden-event-mentions (event_type, trigger, arguments)
    DATA/m2e2/m2e2_rawdata/image/image/        github.com/limanling/m2e2 (README)
    DATA/ace/{train,dev}.json                  if there: ACE 2005 (LDC2006T06) in M2E2's form

M2E2 has no training sentences.  With ACE, all of M2E2 is the test set, as in the paper; without ACE, a
fifth of its documents are the test set, a tenth are for validation, and the rest are for training.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from examples.common.tasks import digest
from examples.published.common import expect, field, read_json
from lora_moe.methods.c_lorae.extraction import Entity, Event, Relation, Schema

ENTITIES = {"PER": "person", "LOC": "location", "ORG": "organization"}
ENTITIES |= dict.fromkeys(("OTHER", "MISC"), "miscellaneous")
EVENTS = (
    *("Movement:Transport", "Conflict:Attack", "Conflict:Demonstrate", "Justice:Arrest-Jail"),
    *("Contact:Phone-Write", "Contact:Meet", "Life:Die", "Transaction:Transfer-Money"),
)
UMT, MNRE = "github.com/jefferyYu/UMT", "github.com/thecharm/MNRE"
M2E2, ACE = "github.com/limanling/m2e2", "catalog.ldc.upenn.edu/LDC2006T06"


class Item(NamedTuple):
    text: str
    records: frozenset  # of extraction.Entity, Relation or Event
    image: Path | None


class Dataset(NamedTuple):
    task: str
    schema: Schema
    train: list[Item]
    valid: list[Item]
    test: list[Item]

    def first(self, limit):
        """The data set with at most `limit` items in each split."""
        splits = {name: getattr(self, name)[:limit] for name in ("train", "valid", "test")}
        return self._replace(**splits)


def twitter(data, name):
    splits = [tweets(data, name, split) for split in ("train", "valid", "test")]
    types = tuple(dict.fromkeys(ENTITIES.values()))
    return Dataset("mner", Schema("entities", "entities", types), *splits)


def tweets(data, name, split):
    path, images = data / name / f"{split}.txt", data / f"{name}_images"
    expect(images, "the tweets' images", UMT)
    text = expect(path, "tweets in lines of a word, a tab and a tag", UMT).read_text("utf-8")
    items = []
    for block in text.replace("\r", "").split("\n\n"):
        if not block.strip("\n"):
            continue
        head, *lines = block.strip("\n").split("\n")
        pairs = [line.rsplit("\t", 1) for line in lines]
        if not head.startswith("IMGID:") or any(len(pair) != 2 for pair in pairs):
            raise SystemExit(
                f"{path}: expected IMGID: and lines of word, tab, tag, got {block!r:.80}"
            )
        words, tags = zip(*pairs) if pairs else ((), ())
        unknown = {tag for tag in tags if tag != "O" and tag[2:] not in ENTITIES}
        if unknown:
            raise SystemExit(f"{path}: expected tags of {sorted(ENTITIES)}, got {sorted(unknown)}")
        found = [(ENTITIES[t], plain(words[i:j])) for t, i, j in spans(tags)]
        records = frozenset(Entity(*record) for record in found if record[1])
        items.append(Item(plain(words), records, images / f"{head[6:].strip()}.jpg"))
    return with_images(items, images)


def spans(tags):
    """[(type, start, end)] of BIO tags; a span may also start with I-, as some in these files do."""
    found, start = [], None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and (tag[:2] != "I-" or tag[2:] != tags[start][2:]):
            found.append((tags[start][2:], start, i))
            start = None
        if tag != "O" and start is None:
            start = i
    return found


def mnre(data):
    """MNRE: the relation of a pair, whose head and tail follow the sentence; relation None becomes `none`."""
    splits = [pairs(data / "mnre", split) for split in ("train", "val", "test")]
    types = {record.type for items in splits for item in items for record in item.records}
    return Dataset("mre", Schema("relations", "relation", tuple(sorted(types))), *splits)


def pairs(folder, split):
    path, images = folder / "txt" / f"ours_{split}.txt", folder / "img_org" / split
    expect(images, "the tweets' images", MNRE)
    items = []
    text = expect(path, "a dict of token, h, t, img_id and relation a line", MNRE).read_text(
        "utf-8"
    )
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = ast.literal_eval(line)
        except (ValueError, SyntaxError):
            raise SystemExit(f"{path}, line {number}: expected a dict, got {line!r:.99}") from None
        words, relation = field(entry, "token", path), field(entry, "relation", path)
        head, tail = (plain([field(entry, end, path)["name"]]) for end in "ht")
        record = [] if relation == "None" else [Relation(relation, head, tail)]
        image = images / field(entry, "img_id", path)
        items.append(Item(f"{plain(words)} Head: {head}. Tail: {tail}.", frozenset(record), image))
    return with_images(items, images)


def m2e2(data):
    folder, ace = data / "m2e2/m2e2_annotations", data / "ace"
    images = expect(data / "m2e2/m2e2_rawdata/image/image", "M2E2's images", M2E2)
    found = {}  # a sentence with text events and multimedia events is in both files
    for name in ("text_only_event.json", "text_multimedia_event.json"):
        for key, item in sentences(folder / name, images, M2E2):
            records = item.records | (found[key].records if key in found else frozenset())
            found[key] = item._replace(records=records)
    test = with_images(list(found.values()), images)
    if ace.exists():
        train, valid = (
            [item for _, item in sentences(ace / name, images, ACE)]
            for name in ("train.json", "dev.json")
        )
    else:
        place = [digest(key.rpartition("_")[0]) % 10 for key in found]
        train = [item for item, n in zip(test, place) if n > 2]
        valid = [item for item, n in zip(test, place) if n == 2]
        test = [item for item, n in zip(test, place) if n < 2]
    events = [event for item in [*train, *valid, *test] for event in item.records]
    roles = {role for event in events for role, _ in event.arguments}
    types = tuple(short(kind) for kind in EVENTS)
    schema = Schema("events", "events", types, tuple(sorted(roles)))
    return Dataset("mee", schema, train, valid, test)


def sentences(path, images, source):
    """Yields (sentence_id, item) for each entry."""
    for number, entry in enumerate(read_json(expect(path, "a list of sentences", source))):
        words, names = field(entry, "words", path), entry.get("image") or [None]
        events = [
            Event(
                short(kind), plain([field(event, "trigger", path)["text"]]), arguments(event, path)
            )
            for event in field(entry, "golden-event-mentions", path)
            if (kind := field(event, "event_type", path)) in EVENTS
        ]
        image = images / names[0] if names[0] else None
        yield str(entry.get("sentence_id", number)), Item(plain(words), frozenset(events), image)


def arguments(event, path):
    found = [(field(a, "role", path), field(a, "text", path)) for a in event.get("arguments", ())]
    pairs = [(role.lower(), plain([text])) for role, text in found]
    return frozenset(pair for pair in pairs if pair[1])


def short(kind):
    """Conflict:Attack -> attack"""
    return kind.partition(":")[2].lower()


def plain(words):
    return " ".join(" ".join(words).split())


def with_images(items, images):
    """The items, without images that are missing, as a few are; SystemExit if all are missing."""
    seen = [i if i.image and i.image.is_file() else i._replace(image=None) for i in items]
    if items and not any(item.image for item in seen):
        raise SystemExit(f"{images}: expected the images of {len(items)} texts, found none of them")
    return seen


READ = {
    "twitter2015": lambda data: twitter(data, "twitter2015"),
    "twitter2017": lambda data: twitter(data, "twitter2017"),
    "mnre": mnre,
    "m2e2": m2e2,
}
