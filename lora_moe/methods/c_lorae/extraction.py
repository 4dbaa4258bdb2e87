r"""Unified multimodal information extraction as text: instructions, answers, a strict reader, scores.

    labels     happy; sleepy
    entities   person: Ada Lovelace; place: London
    relations  born in: Ada Lovelace | London
    events     attack: bombed | attacker = rebels | target = the bridge

An answer is a list of records of one kind, or `none` if there are none.  In a value, each of ``; : | = \`` is
escaped with a backslash.  The reader accepts exactly what the writer can write, except for spaces around
separators: a record with a wrong number of fields, an empty field or a type outside the schema is malformed.
Scores count each malformed record as a wrong prediction, so that a model gains nothing from extra output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("labels", "entities", "relations", "events")
NONE = "none"


class Entity(NamedTuple):
    type: str
    text: str


class Relation(NamedTuple):
    type: str
    head: str
    tail: str


class Event(NamedTuple):
    type: str
    trigger: str
    arguments: frozenset[tuple[str, str]]  # (role, text)


class Schema(NamedTuple):
    """What to extract: `name` in the instruction, `types` are the allowed types or labels, `roles` those
    of an event's arguments."""

    kind: str
    name: str
    types: tuple[str, ...]
    roles: tuple[str, ...] = ()


class Reading(NamedTuple):
    """A parsed answer: the well-formed records, and the number of malformed ones."""

    records: frozenset
    malformed: int


class Score(NamedTuple):
    precision: float
    recall: float
    f1: float


def instruction(schema: Schema, text: str, *, image: bool = True, brief: bool = False) -> str:
    """The model's input: task, allowed types, sentence; the answer follows.

    Args:
        schema: what to extract.
        text: the sentence; line breaks become spaces.
        image: mention that there is an image.
        brief: only the sentence and the task's name, for a model trained on the task.
    Raises:
        ValueError: if the schema's kind is unknown.
    """
    if schema.kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {schema.kind!r}")
    if brief:
        return f"{_one_line(text)}\n{schema.name}:"
    source = "text and image" if image else "text"
    roles = f" with roles {', '.join(schema.roles)}" if schema.roles else ""
    types = f"{', '.join(schema.types)}{roles}"
    return f"Extract {schema.name} ({types}) from {source}.\nText: {_one_line(text)}\nAnswer:"


def write(schema: Schema, records) -> str:
    """The answer for records, in the given order (sets are sorted); `read` is the inverse.

    Raises:
        ValueError: if a record does not fit the schema.
    """
    ordered = not isinstance(records, (set, frozenset))
    records = list(records) if ordered else sorted(records, key=_order)
    answer = "; ".join(_write_record(schema, record) for record in records) or NONE
    if read(schema, answer) != Reading(frozenset(map(_cleaned, records)), 0):
        raise ValueError(f"records: expected unique {schema.kind} of {schema}, got {records!r}")
    return answer


def read(schema: Schema, answer: str) -> Reading:
    """The records of a generated answer; a repeated record counts once."""
    if _one_line(answer) == NONE:
        return Reading(frozenset(), 0)
    records = [_read_record(schema, piece) for piece in _split(answer, ";")]
    return Reading(frozenset(r for r in records if r is not None), records.count(None))


def f1(predicted: Sequence[Reading], wanted: Sequence[frozenset]) -> Score:
    """Micro precision, recall and F1 over all answers: exact match of whole records.

    This is entity F1 (type and text) and relation F1 (type, head, tail).
    """
    right = sum(len(p.records & w) for p, w in zip(predicted, wanted, strict=True))
    said = sum(len(p.records) + p.malformed for p in predicted)
    return _score(right, said, sum(map(len, wanted)))


def trigger_f1(predicted: Sequence[Reading], wanted: Sequence[frozenset]) -> Score:
    """F1 of events' types and triggers."""
    return f1(*_mapped(lambda event: {(event.type, event.trigger)}, predicted, wanted))


def argument_f1(predicted: Sequence[Reading], wanted: Sequence[frozenset]) -> Score:
    """F1 of events' arguments: the event's type, the role and the text."""
    return f1(*_mapped(lambda e: {(e.type, *pair) for pair in e.arguments}, predicted, wanted))


def set_f1(predicted: Reading, wanted: frozenset) -> float:
    """2 |P & W| / (|P| + |W|) of one item, where P includes malformed records; 1 if both are empty."""
    size = len(predicted.records) + predicted.malformed + len(wanted)
    return 2 * len(predicted.records & wanted) / size if size else 1.0


def _mapped(parts_of, predicted, wanted):
    """Readings and records as sets of the parts that are scored."""

    def parts(records):
        return frozenset(part for record in records for part in parts_of(record))

    return [Reading(parts(p.records), p.malformed) for p in predicted], [parts(w) for w in wanted]


def _score(right, said, wanted):
    """Precision, recall and F1; all are 1 if nothing is expected or predicted."""
    precision = right / said if said else float(wanted == 0)
    recall = right / wanted if wanted else float(said == 0)
    total = precision + recall
    return Score(precision, recall, 2 * precision * recall / total if total else 0.0)


# --- one record ----------------------------------------------------------------------------------


def _write_record(schema, record):
    if schema.kind == "labels":
        return _escaped(record)
    kind, first, *rest = record
    if schema.kind == "events":
        arguments = sorted(rest[0])
        rest = [f"{_escaped(role)} = {_escaped(text)}" for role, text in arguments]
    else:
        rest = map(_escaped, rest)
    return f"{_escaped(kind)}: {' | '.join([_escaped(first), *rest])}"


def _read_record(schema, piece):
    """A record, or None if it is malformed."""
    if schema.kind == "labels":
        label = _plain(piece)
        return label if label in schema.types else None
    kind, *rest = map(_one_line, _split(piece, ":"))
    if len(rest) != 1 or _plain(kind) not in schema.types:
        return None
    kind, fields = _plain(kind), _split(rest[0], "|")
    if schema.kind == "events":
        return _read_event(schema, kind, fields)
    values = [_plain(field) for field in fields]
    size = 1 if schema.kind == "entities" else 2
    if len(values) != size or not all(values):
        return None
    return Entity(kind, *values) if size == 1 else Relation(kind, *values)


def _read_event(schema, kind, fields):
    trigger, *arguments = fields
    pairs = [tuple(_plain(side) for side in _split(argument, "=")) for argument in arguments]
    fit = all(len(pair) == 2 and pair[0] in schema.roles and pair[1] for pair in pairs)
    trigger = _plain(trigger)
    return Event(kind, trigger, frozenset(pairs)) if trigger and fit else None


def _split(text, sign):
    """Split at each unescaped `sign`; a backslash escapes one character."""
    parts, start, i = [], 0, 0
    while i < len(text):
        if text[i] == sign:
            parts.append(text[start:i])
            start = i + 1
        i += 2 if text[i] == "\\" else 1
    return [*parts, text[start:]]


def _escaped(value):
    return re.sub(r"([;:|=\\])", r"\\\1", _one_line(value))


def _plain(field):
    """The value of a field, or None if it contains an unescaped separator."""
    rest = re.sub(r"\\[;:|=\\]", "", field)
    if re.search(r"[;:|=\\]", rest):
        return None
    return re.sub(r"\\(.)", r"\1", _one_line(field))


def _one_line(text):
    return " ".join(text.split())


def _cleaned(record):
    if isinstance(record, str):
        return _one_line(record)
    if isinstance(record, Event):
        pairs = frozenset((_one_line(role), _one_line(text)) for role, text in record.arguments)
        return Event(_one_line(record.type), _one_line(record.trigger), pairs)
    return type(record)(*map(_one_line, record))


def _order(record):
    if not isinstance(record, Event):
        return str(record)
    return str(sorted(record.arguments)) + str(record[:2])
