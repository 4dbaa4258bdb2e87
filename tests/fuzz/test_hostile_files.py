"""Malicious files: every loader refuses them within time and memory bounded by the file's size.

CPU      under 1 s for a file that is refused, under 1 s per 500 MB for one that is read
memory   the peak rises by at most 2 x the file's size + 64 MB
"""

from __future__ import annotations

import functools
import json

import pytest

from .loaders import DOCUMENTED, LOADERS, described, parts, raw, saved
from .refusals import every_loader, read_or_refuse, refuse


@every_loader
def test_the_undamaged_files_are_read(name, tmp_path):
    loader = LOADERS[name]
    path = saved(loader, tmp_path)
    loader.load(loader.fresh(8), tmp_path)
    path.write_bytes(described(path.read_bytes(), loader.key, lambda found: None))
    loader.load(loader.fresh(8), tmp_path)


JSON = [None, True, 1, 1.0, -1, 10**30, "", "1", [], [[]], {}, {"": None}, [{"version": 1}]]


@every_loader
@pytest.mark.parametrize("value", JSON, ids=repr)
def test_metadata_of_any_json_type(name, value, tmp_path):
    loader = LOADERS[name]
    path = saved(loader, tmp_path)
    content = path.read_bytes()
    header, data = parts(content)
    for metadata in (value, {loader.key: value}, {loader.key: json.dumps(value)}):
        path.write_bytes(raw(header | {"__metadata__": metadata}, data))
        refuse(loader, path)


VERSIONS = [True, 1.0, "1", None, [1], {"1": 1}, 0, -1, 10**30]


@every_loader
@pytest.mark.parametrize("value", VERSIONS, ids=repr)
def test_a_version_that_only_looks_like_ours(name, value, tmp_path):
    loader = LOADERS[name]
    if name == "mmolre":
        pytest.skip("its description is the configuration alone")
    path = saved(loader, tmp_path)
    path.write_bytes(described(path.read_bytes(), loader.key, lambda d: d.update(version=value)))
    refuse(loader, path)


def paths_into(value, path=()):
    """Yields the path of every value in a description."""
    yield path
    parts = enumerate(value) if isinstance(value, list) else getattr(value, "items", list)()
    for key, part in parts:
        yield from paths_into(part, (*path, key))


WRONG = [
    None,
    True,
    -1,
    0,
    2**31,
    10**400,
    1e308,
    "",
    "\x00",
    "x" * 10_000,
    [],
    [[1]],
    {},
    {"a": 1},
]


@every_loader
def test_every_field_of_a_description_may_be_anything(name, tmp_path):
    """A field with any value is accepted or refused with a documented exception."""
    loader = LOADERS[name]
    path = saved(loader, tmp_path)
    content = path.read_bytes()
    whole = json.loads(parts(content)[0]["__metadata__"][loader.key])
    for place in paths_into(whole):
        for value in WRONG:
            change = functools.partial(put, place=place, value=value)
            path.write_bytes(described(content, loader.key, change))
            try:
                loader.load(loader.fresh(8), tmp_path)
            except DOCUMENTED as error:
                assert len(str(error)) < 20_000


def put(found, place, value):
    if not place:
        return value
    *way, last = place
    for key in way:
        found = found[key]
    found[last] = value
    return None


DEEP = {
    "lists": "[" * 900 + "]" * 900,
    "objects": '{"a":' * 900 + "1" + "}" * 900,
    "too deep": "[" * 100_000 + "]" * 100_000,
    "long list": "[" + "0," * 400_000 + "0]",
    "many names": "{" + ",".join(f'"{i:x}":0' for i in range(100_000)) + "}",
    "a long number": "9" * 1_000_000,
    "many objects": "[" + "{}," * 300_000 + "{}]",
}


@every_loader
@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("where", ["description", "a field", "modules"])
def test_descriptions_that_are_deep_or_long(name, kind, where, tmp_path):
    """Descriptions that are deep or long are refused, even if their brackets are written as escapes."""
    loader = LOADERS[name]
    path = saved(loader, tmp_path)
    header, data = parts(path.read_bytes())
    text = header["__metadata__"][loader.key]
    if where == "description":
        text = DEEP[kind]
    elif where == "a field":
        text = text[:-1] + ', "more": ' + DEEP[kind] + "}"
    else:
        first = text.index(": ", text.index('"modules"') if '"modules"' in text else 0)
        text = text[:first] + ": " + DEEP[kind] + ', "z": ' + text[first + 2 :]
    del header["__metadata__"]
    hidden = json.dumps(text).replace("[", "\\u005b").replace("{", "\\u007b")
    for written in (json.dumps(text), hidden):
        metadata = f'{{"__metadata__": {{"{loader.key}": {written}}}, '
        path.write_bytes(raw((metadata + json.dumps(header)[1:]).encode(), data))
        read_or_refuse(loader, path, loader.fresh(8))  # not every loader refuses an extra field
