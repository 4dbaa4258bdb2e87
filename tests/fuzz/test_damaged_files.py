"""Randomly damaged files: for any bytes, a loader reads them or raises what it documents.

LORA_MOE_NIGHTLY=n tries n times as many; each failure names the seed that reproduces the file.
"""

from __future__ import annotations

import json
import random

import pytest

from ..support.cost import measured
from .loaders import DOCUMENTED, LOADERS, NIGHTLY, described, parts, raw, saved

FILES = 150 * NIGHTLY
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    -1,
    -(2**31),
]
BAD = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\x80\xff"]  # fp32
VALUES = [
    *NUMBERS,
    None,
    True,
    0.5,
    1e308,
    "",
    "x",
    "\ud800",
    "F32",
    "I64",
    "F8_E4M3",
    [],
    [[]],
    {},
]


def flip_bits(content, rng):
    out = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_in_the_header(content, rng):
    end = 8 + int.from_bytes(content[:8], "little")
    return flip_bits(content[:end], rng) + content[end:]


def another_length(content, rng):
    return rng.choice(NUMBERS[:14]).to_bytes(8, "little") + content[8:]


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def twice(content, rng):
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:end] + content[begin:]


def dropped(content, rng):
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:begin] + content[end:]


def any_value_in_the_header(content, rng):
    header, data = parts(content)
    entry = header[rng.choice(list(header))]
    entry[rng.choice(list(entry))] = rng.choice(VALUES)
    return raw(header, data)


def another_shape(content, rng):
    """A wrong shape with matching data, which only the model can detect."""
    header, data = parts(content)
    entry = header[rng.choice([k for k in header if k != "__metadata__"])]
    shape = [rng.choice([0, 1, 2, 3, 5, 8, 64]) for _ in range(rng.randint(0, 4))]
    size = 4
    for n in shape:
        size *= n
    entry.update(shape=shape, dtype="F32", data_offsets=[len(data), len(data) + size])
    return raw(header, data + bytes(size))


def another_name(content, rng):
    header, data = parts(content)
    key = rng.choice([k for k in header if k != "__metadata__"])
    header[rng.choice([key + "x", key[:-1], "", "\x1b[2J", "../" + key, key.upper()])] = header.pop(
        key
    )
    return raw(header, data)


def bad_numbers(content, rng):
    """NaN, infinities and huge values among the data."""
    header, data = parts(content)
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) // 4) * 4
        out[at : at + 4] = rng.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\x80\xff"]
        )
    return raw(header, bytes(out))


def anything_in_the_description(content, rng, key=None):
    def change(found):
        return put(found, rng)

    return described(content, key, change)


def put(found, rng):
    """Replaces a random element with a random value."""
    places = [found]
    while isinstance(places[-1], (dict, list)) and places[-1] and rng.random() < 0.8:
        here = places[-1]
        step = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        if not isinstance(here[step], (dict, list)) or rng.random() < 0.3:
            here[step] = rng.choice(VALUES)
            return found
        places.append(here[step])
    return rng.choice(VALUES) if rng.random() < 0.1 else found


DAMAGE = [
    flip_bits, flip_in_the_header, another_length, cut, twice, dropped, any_value_in_the_header,
    another_shape, another_name, bad_numbers, anything_in_the_description,
]  # fmt: skip


def damaged(content, seed, key):
    """The file damaged once or several times; if it can no longer be parsed, it is returned as is."""
    rng = random.Random(seed)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        damage = rng.choice(DAMAGE)
        more = {"key": key} if damage is anything_in_the_description else {}
        try:
            content = damage(content, rng, **more)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            return content  # earlier damage made the file unparsable
    return content


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files(name, tmp_path):
    loader = LOADERS[name]
    path = saved(loader, tmp_path)
    whole, refused = path.read_bytes(), 0
    model = loader.fresh(8)  # a failed load must leave the model unchanged and usable
    with measured() as cost:
        for seed in range(FILES):
            path.write_bytes(damaged(whole, seed, loader.key))
            try:
                loader.load(model, tmp_path)
                model = loader.fresh(8)
            except DOCUMENTED as error:
                refused += 1
                assert str(error)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert FILES * 0.3 < refused < FILES  # some damage cannot be detected, such as a changed weight
    assert cost.seconds < 0.1 * FILES
    assert cost.rise < 64 << 20
    path.write_bytes(whole)
    loader.load(model, tmp_path)


def test_the_damage_is_the_same_for_the_same_seed():
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    content = raw({"a": entry, "__metadata__": {"k": "{}"}}, bytes(4))
    assert json.loads(content[8:-4])
    made = [damaged(content, seed, "k") for seed in range(50)]
    assert made == [damaged(content, seed, "k") for seed in range(50)]
    assert len(set(made)) > 30
