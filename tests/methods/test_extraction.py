"""Instructions, answers and scores on handwritten examples, well-formed and malformed."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_moe.methods.c_lorae import extraction
from lora_moe.methods.c_lorae.extraction import Entity, Event, Reading, Relation, Schema

LABELS = Schema("labels", "emotions", ("happy", "sad", "in love"))
ENTITIES = Schema("entities", "entities", ("person", "place"))
RELATIONS = Schema("relations", "relations", ("born in", "works for"))
EVENTS = Schema("events", "events", ("attack", "meet"), ("attacker", "target", "place"))

ADA, LONDON = Entity("person", "Ada Lovelace"), Entity("place", "London")
BORN = Relation("born in", "Ada Lovelace", "London")
RAID = Event("attack", "bombed", frozenset({("attacker", "rebels"), ("target", "the bridge")}))
TALK = Event("meet", "met", frozenset())


def of(*records, malformed=0):
    return Reading(frozenset(records), malformed)


@pytest.mark.parametrize(
    ("schema", "answer", "want"),
    [
        (LABELS, "happy; in love", of("happy", "in love")),
        (LABELS, " happy ;  in   love", of("happy", "in love")),
        (LABELS, "none", of()),
        (LABELS, "happy; happy", of("happy")),
        (LABELS, "happy; glad", of("happy", malformed=1)),
        (LABELS, "Happy", of(malformed=1)),
        (LABELS, "happy;", of("happy", malformed=1)),
        (LABELS, "", of(malformed=1)),
        (LABELS, "none; happy", of("happy", malformed=1)),
        (LABELS, "happy sad", of(malformed=1)),
        (ENTITIES, "person: Ada Lovelace; place: London", of(ADA, LONDON)),
        (ENTITIES, "person: ; place: London", of(LONDON, malformed=1)),
        (ENTITIES, "person Ada Lovelace", of(malformed=1)),
        (ENTITIES, "animal: Ada Lovelace", of(malformed=1)),
        (ENTITIES, "person: Ada: Lovelace", of(malformed=1)),
        (ENTITIES, "person: Ada | Lovelace", of(malformed=1)),
        (ENTITIES, r"person: Ada\: Lovelace", of(Entity("person", "Ada: Lovelace"))),
        (ENTITIES, r"person: C\\O\; Ltd.", of(Entity("person", r"C\O; Ltd."))),
        (ENTITIES, r"person: Ada\ Lovelace", of(malformed=1)),
        (ENTITIES, "person: Ada\\", of(malformed=1)),
        (RELATIONS, "born in: Ada Lovelace | London", of(BORN)),
        (RELATIONS, "born in: Ada Lovelace", of(malformed=1)),
        (RELATIONS, "born in: Ada Lovelace | London | 1815", of(malformed=1)),
        (RELATIONS, "born in: Ada Lovelace | ", of(malformed=1)),
        (EVENTS, "attack: bombed | attacker = rebels | target = the bridge; meet: met", of(RAID, TALK)),
        (EVENTS, "attack: bombed | attacker rebels", of(malformed=1)),
        (EVENTS, "attack: bombed | driver = rebels", of(malformed=1)),
        (EVENTS, "attack: bombed | attacker = ", of(malformed=1)),
        (EVENTS, "attack: | attacker = rebels", of(malformed=1)),
        (EVENTS, "attack: bom=bed", of(malformed=1)),
        (EVENTS, "attack: bombed | attacker = a = b", of(malformed=1)),
    ],
)  # fmt: skip
def test_read(schema, answer, want):
    assert extraction.read(schema, answer) == want


@pytest.mark.parametrize(
    ("schema", "records", "want"),
    [
        (LABELS, {"sad", "happy"}, "happy; sad"),
        (LABELS, [], "none"),
        (ENTITIES, [LONDON, ADA], "place: London; person: Ada Lovelace"),
        (RELATIONS, {BORN}, "born in: Ada Lovelace | London"),
        (
            EVENTS,
            {RAID, TALK},
            "attack: bombed | attacker = rebels | target = the bridge; meet: met",
        ),
    ],
)
def test_write(schema, records, want):
    assert extraction.write(schema, records) == want


@pytest.mark.parametrize(
    ("schema", "records"),
    [
        (LABELS, ["glad"]),
        (LABELS, ["happy", "happy "]),
        (ENTITIES, [Entity("animal", "cat")]),
        (ENTITIES, [Entity("person", " ")]),
        (EVENTS, [Event("attack", "hit", frozenset({("driver", "Ada")}))]),
        (Schema("labels", "x", ("none",)), ["none"]),
    ],
)
def test_write_refuses_what_could_not_be_read_back(schema, records):
    if records == ["happy", "happy "]:
        assert extraction.write(schema, records) == "happy; happy"  # reads back as the same set
        return
    with pytest.raises(ValueError, match="records: expected"):
        extraction.write(schema, records)


text = st.text(st.sampled_from(string.ascii_letters + r" ;:|=\ü"), min_size=1).filter(str.strip)
plain = text.map(lambda value: " ".join(value.split()))


@given(st.frozensets(st.builds(Relation, st.sampled_from(RELATIONS.types), plain, plain)))
def test_relations_round_trip(records):
    assert extraction.read(RELATIONS, extraction.write(RELATIONS, records)) == Reading(records, 0)


arguments = st.frozensets(st.tuples(st.sampled_from(EVENTS.roles), plain))


@given(st.frozensets(st.builds(Event, st.sampled_from(EVENTS.types), plain, arguments)))
def test_events_round_trip(records):
    assert extraction.read(EVENTS, extraction.write(EVENTS, records)) == Reading(records, 0)


@given(st.text(st.sampled_from("person place:;|=\\ \nab"), max_size=40))
def test_any_answer_can_be_read(answer):
    reading = extraction.read(ENTITIES, answer)
    assert extraction.read(ENTITIES, extraction.write(ENTITIES, reading.records)).records == (
        reading.records
    )


def test_entity_f1_by_hand():
    """Four predicted (one malformed), two of them correct, three wanted."""
    predicted = [of(ADA, LONDON), of(Entity("place", "Ada"), malformed=1)]
    wanted = [frozenset({ADA, LONDON}), frozenset({Entity("person", "Ada")})]
    assert extraction.f1(predicted, wanted) == pytest.approx((2 / 4, 2 / 3, 4 / 7))


def test_relation_f1_requires_head_tail_and_type_in_order():
    wanted = [frozenset({BORN})]
    assert extraction.f1([of(BORN)], wanted).f1 == 1
    for wrong in (Relation("works for", *BORN[1:]), Relation("born in", "London", "Ada Lovelace")):
        assert extraction.f1([of(wrong)], wanted) == (0, 0, 0)


def test_event_scores_by_hand():
    """A correct trigger with one of two arguments correct; a second event with a wrong type."""
    said = Event("attack", "bombed", frozenset({("attacker", "rebels"), ("target", "a bridge")}))
    predicted, wanted = [of(said, Event("attack", "met", frozenset()))], [frozenset({RAID, TALK})]
    assert extraction.trigger_f1(predicted, wanted) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert extraction.argument_f1(predicted, wanted) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert extraction.argument_f1([of(malformed=2)], wanted) == (0, 0, 0)
    assert extraction.argument_f1([of(TALK)], [frozenset({TALK})]) == (1, 1, 1)


def test_set_f1():
    wanted = frozenset({"happy", "sad"})
    assert extraction.set_f1(of("happy", "sad"), wanted) == 1
    assert extraction.set_f1(of("happy"), wanted) == pytest.approx(2 / 3)
    assert extraction.set_f1(of("happy", malformed=1), wanted) == pytest.approx(1 / 2)
    assert extraction.set_f1(of(), frozenset()) == 1
    assert extraction.set_f1(of(malformed=1), frozenset()) == 0


def test_instruction():
    got = extraction.instruction(EVENTS, "Rebels bombed\nthe bridge.")
    assert got == (
        "Extract events (attack, meet with roles attacker, target, place) from text and image.\n"
        "Text: Rebels bombed the bridge.\nAnswer:"
    )
    assert extraction.instruction(LABELS, "x", image=False).startswith(
        "Extract emotions (happy, sad, in love) from text."
    )
    assert extraction.instruction(LABELS, "hello there", brief=True) == "hello there\nemotions:"
    with pytest.raises(ValueError, match="kind: expected one of"):
        extraction.instruction(Schema("facts", "facts", ()), "x")
