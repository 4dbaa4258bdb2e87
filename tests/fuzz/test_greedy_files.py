"""Files that demand excessive memory or time, and large files that legitimately need it."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ..support.cost import measured
from .loaders import LOADERS, described, parts, raw, saved, slices
from .refusals import every_loader, read_or_refuse, refuse


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
    """Writes a file with other tensors and the same description."""
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
    """A loader that trusts the shape would create that many keys one by one."""
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
GREEDY = {  # small files with a configuration that demands much memory
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
    """As many tensors as a header can hold, none of which fits."""
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
    """Patterns are only used before saving; a header with too many brackets is refused."""
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
    """fp32 experts on a bf16 base take twice the file's size: the file is read, then copied."""
    loader = LOADERS[name]
    width = 1 << 20 if name != "mmolre" else 1 << 10
    torch.manual_seed(0)
    model = loader.model(width)
    model = model if dtype == torch.float32 else model.to(dtype)
    loader.save(model, tmp_path)
    path = tmp_path / loader.file
    numbers = sum(math.prod(place.shape) for place in slices(path).values())
    del model
    fresh = loader.fresh(width)
    fresh = fresh if dtype == torch.float32 or fresh is None else fresh.to(dtype)
    with measured() as plain:  # the cost of reading that many bytes on this machine
        torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).clone()
    with measured() as cost:
        loader.load(fresh, tmp_path)
    bound = 2 * 4 * numbers + (64 << 20)
    assert cost.rise <= bound, f"{cost.rise >> 20} MB, at most {bound >> 20} expected"
    assert cost.seconds < 1 + 5 * plain.seconds, f"{cost.seconds:.2f} s, {plain.seconds:.2f} s"
