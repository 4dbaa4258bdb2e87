"""Malicious files: every loader refuses them within time and memory bounded by the file's size.

CPU      under 1 s for a file that is refused, under 1 s per 500 MB for one that is read
memory   the peak rises by at most 2 x the file's size + 64 MB
"""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch

from ..support.cost import measured
from .loaders import DOCUMENTED, LOADERS, described, parts, raw, saved

every_loader = pytest.mark.parametrize("name", LOADERS)


def refuse(loader, path, width=8):
    """The loader refuses the file within the bounds, and the model is as it was."""
    model = loader.fresh(width)
    before = state(model)
    error = read_or_refuse(loader, path, model)
    assert error is not None
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(error)


def read_or_refuse(loader, path, model):
    """Within the bounds; returns the exception, which must be a documented one."""
    error = None
    with measured() as cost:
        try:
            loader.load(model, path.parent)
        except DOCUMENTED as caught:
            error = caught
            assert str(error)
    assert cost.seconds < 1, f"{cost.seconds:.1f} s"
    assert cost.rise <= 2 * path.stat().st_size + (64 << 20), f"{cost.rise >> 20} MB"
    return error


def state(model):
    return {} if model is None else {k: v.clone() for k, v in model.state_dict().items()}


@every_loader
def test_what_is_damaged_below_was_whole(name, tmp_path):
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
    """Every place in a description."""
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
    """Whatever it is, it is refused, or it fits: nothing but a documented exception comes out."""
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
    """Brackets may hide from a count of them as escapes."""
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
        read_or_refuse(loader, path, loader.fresh(8))  # a field more is no fault everywhere


def tensors(shapes: dict, data: int = 0, dtype: str = "F32") -> tuple[dict, bytes]:
    header, begin = {}, 0
    for key, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    return header, bytes(begin)


def with_tensors(path, shapes, change=lambda header: None):
    """A file whose tensors are others, with the same description."""
    header, _ = parts(path.read_bytes())
    new, data = tensors(shapes)
    new["__metadata__"] = header["__metadata__"]
    change(new)
    path.write_bytes(raw(new, data))


@pytest.mark.parametrize(
    "shape", [[20_000, 0], [0, 20_000], [21_000], [0], [], [2, 3, 4], [5000, 1]]
)
@pytest.mark.parametrize("key", ["text_keys", "image_keys", "both"])
def test_a_selector_of_any_shape(shape, key, tmp_path):
    """A loader that believes it would make so many keys, one after the other."""
    loader = LOADERS["branch_lora"]
    path = saved(loader, tmp_path)
    shapes = dict.fromkeys(["selector.text_keys", "selector.image_keys"], shape)
    shapes = shapes if key == "both" else {f"selector.{key}": shape}
    with_tensors(path, shapes)
    refuse(loader, path)


@pytest.mark.parametrize("tasks", [0, 1, 3000])
def test_a_selector_of_many_tasks_is_read(tasks, tmp_path):
    loader = LOADERS["branch_lora"]
    path = saved(loader, tmp_path)
    header, data = parts(path.read_bytes())
    spans = {k: v["data_offsets"] for k, v in header.items() if k != "__metadata__"}
    kept = [k for k in header if k != "__metadata__" and not k.startswith("selector.")]
    new, out = {"__metadata__": header["__metadata__"]}, b""
    for k in kept:
        piece = data[slice(*spans[k])]
        new[k] = header[k] | {"data_offsets": [len(out), len(out) + len(piece)]}
        out += piece
    for k, width in (("selector.text_keys", 6), ("selector.image_keys", 4)):
        size = tasks * width * 4
        new[k] = {
            "dtype": "F32",
            "shape": [tasks, width],
            "data_offsets": [len(out), len(out) + size],
        }
        out += bytes(size)
    path.write_bytes(raw(new, out))
    with measured() as cost:
        selector = loader.load(loader.fresh(8), tmp_path)
    assert selector.text_keys.shape == (tasks, 6) and selector.image_keys.shape == (tasks, 4)
    assert cost.seconds < 1


WIDE = 65_536
GREEDY = {  # small files whose configuration asks for much
    "branch_lora": lambda d: (d["config"].update(r=1024, num_experts=60), d.update(branches=60)),
    "mmolre": lambda d: d.update(width=65_536, shared_ranks=[1024] * 64, blocks=64),
    "load_adapter": None,
}


@pytest.mark.parametrize("name", ["branch_lora", "mmolre"])
def test_a_configuration_that_asks_for_much_allocates_nothing(name, tmp_path):
    loader = LOADERS[name]
    path = saved(loader, tmp_path)
    content = described(path.read_bytes(), loader.key, lambda d: GREEDY[name](d) and None)
    path.write_bytes(content)
    refuse(loader, path, WIDE)


def test_many_blocks_of_many_parts(tmp_path):
    """As many tensors as a header holds, none of which fits."""
    loader = LOADERS["mmolre"]
    path = saved(loader, tmp_path)

    def many(d):
        d.update(modalities={f"m{i}": 1 for i in range(64)}, width=1, blocks=64)
        d.update(shared_ranks=[1] * 64, tasks={f"t{i}": d["tasks"]["a"] for i in range(64)})

    path.write_bytes(described(path.read_bytes(), loader.key, many))
    with_tensors(path, {f"{i:x}": [0] for i in range(26_000)})
    refuse(loader, path)


def test_many_branches_on_many_layers(tmp_path):
    loader = LOADERS["branch_lora"]
    path = saved(loader, tmp_path)
    path.write_bytes(
        described(
            path.read_bytes(), loader.key, lambda d: d.update(branches=25_000, routers=[3] * 900)
        )
    )
    with_tensors(path, {f"{i:x}": [0] for i in range(26_000)})
    refuse(loader, path)


PATTERNS = {
    "ranges": "(?i)" + "[a-\uffff]" * 450,
    "escaped": "(?i)" + "[a-\\uffff]" * 400,
    "repeats": "(a{0,900}){0,900}" * 40,
    "nested": "(" * 400 + "a" + "*)" * 400,
    "no pattern": "(",
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "name", ["load_adapter", "load_adapter, into experts", "adapter_info", "branch_lora"]
)
def test_patterns_of_a_file_are_not_compiled(name, pattern, tmp_path, monkeypatch):
    """They have done their work when the file was saved; a header of too many brackets is refused."""
    loader = LOADERS[name]
    path = saved(loader, tmp_path)

    def change(d):
        fields = d["config"] if name == "branch_lora" else d["adapters"][0]["training"]
        fields.update(target_modules=PATTERNS[pattern], exclude_modules=PATTERNS[pattern])

    path.write_bytes(described(path.read_bytes(), loader.key, change))
    model = loader.fresh(8)

    def never(found, flags=0, real=re._compile):
        assert found != PATTERNS[pattern]
        return real(found, flags)

    monkeypatch.setattr(re, "_compile", never)
    refused = read_or_refuse(loader, path, model)
    if refused is not None:
        assert "empty brackets" in str(refused)
    elif name in ("load_adapter", "branch_lora"):
        assert model.q.config.target_modules == PATTERNS[pattern]


def test_compiling_a_pattern_is_noticed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        re, "_compile", lambda *args, real=re._compile: seen.append(args) or real(*args)
    )
    re.fullmatch("a pattern of a file", "")
    assert seen[0][0] == "a pattern of a file"


@every_loader
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_file_is_read_within_the_bounds(name, dtype, tmp_path):
    """Half the data in one tensor; refused for its last value, and read."""
    loader = LOADERS[name]
    width = 1 << 20 if name != "mmolre" else 1 << 10
    torch.manual_seed(0)
    model = loader.model(width)
    model = model if dtype == torch.float32 else model.to(dtype)
    loader.save(model, tmp_path)
    path = tmp_path / loader.file
    size = path.stat().st_size
    del model
    fresh = loader.fresh(width)
    fresh = fresh if dtype == torch.float32 or fresh is None else fresh.to(dtype)
    with measured() as plain:  # what this machine takes for that many bytes now
        torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).clone()
    with measured() as cost:
        loader.load(fresh, tmp_path)
    assert cost.rise <= 2 * size + (64 << 20), f"{cost.rise >> 20} MB of a file of {size >> 20}"
    assert cost.seconds < 1 + 5 * plain.seconds, f"{cost.seconds:.2f} s, {plain.seconds:.2f} s"
