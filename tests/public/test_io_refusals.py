"""Files that do not fit are refused and leave the model unchanged."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    inject,
    load_adapter,
    save_adapter,
)

from ..support.adapters import CONFIG, FILE, Block, Model, assert_unchanged, rewrite, trained
from ..support.cost import measured


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def describe(directory, change):
    """Rewrites the saved file with its description (a dict) changed by `change`."""
    with safetensors.safe_open(Path(directory) / FILE, "pt") as file:
        info = json.loads(file.metadata()["lora_moe"])
    info = change(info) or info
    rewrite(directory, metadata={"lora_moe": info if isinstance(info, str) else json.dumps(info)})


@pytest.fixture
def saved(tmp_path):
    save_adapter(trained(), tmp_path)
    return tmp_path


A, B = "blocks.0.q.lora_A", "blocks.1.v.lora_B"


def drop(*keys):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in keys}


def put(key, value):
    return lambda tensors: tensors | {key: value}


def poison(value, dtype=torch.float32):
    def change(tensors):
        tensors[B] = tensors[B].to(dtype)
        tensors[B][-1, -1] = value
        return tensors

    return change


UNFIT = {
    "missing": (drop(A, B), [A, B, "missing"]),
    "extra": (put("evil", torch.zeros(1)), ["'evil': not in the model"]),
    "extra-control-characters": (put("\x1b[2J", torch.zeros(1)), [r"'\\x1b\[2J': not"]),
    "base-weight": (put("blocks.0.q.weight", torch.zeros(8, 6)), ["not in the model"]),
    "transposed": (put(A, torch.zeros(6, 8)), [rf"{A}: expected \(8, 6\), got \(6, 8\)"]),
    "flat": (put(A, torch.zeros(48)), [rf"{A}: expected \(8, 6\), got \(48,\)"]),
    "all-at-once": (
        lambda t: {**drop(A)(t), B: torch.zeros(2), "evil": torch.zeros(1)},
        [f"{A}: missing", rf"{B}: expected \(8, 6\), got \(2,\)", "'evil'"],
    ),
    "int8": (put(A, torch.zeros(8, 6, dtype=torch.int8)), [f"{A}: expected one of .* got 'I8'"]),
    "int64": (put(A, torch.zeros(8, 6, dtype=torch.int64)), ["got 'I64'"]),
    "bool": (put(A, torch.zeros(8, 6, dtype=torch.bool)), ["got 'BOOL'"]),
    "nan": (poison(float("nan")), [f"{B}: expected finite values"]),
    "inf": (poison(-float("inf")), [f"{B}: expected finite values"]),
    "inf-after-conversion": (poison(1e300, torch.float64), [f"{B}: expected finite values"]),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "injected"])
@pytest.mark.parametrize("change, messages", UNFIT.values(), ids=UNFIT)
def test_unfit_tensors_change_nothing(saved, change, messages, fresh):
    rewrite(saved, change)
    model = Model() if fresh else trained(seed=2)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        load_adapter(model, saved)
    for message in messages:
        assert re.search(message, str(error.value))
    assert_unchanged(model, before)
    if fresh:
        assert all(p.requires_grad for p in model.parameters())


def test_another_model(saved):
    with pytest.raises(ValueError, match=r"blocks.0.q.lora_A: expected \(8, 7\), got \(8, 6\)"):
        load_adapter(Model(width=7), saved)
    other = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.LayerNorm(8)})])})
    with pytest.raises(ValueError) as error:
        load_adapter(other, saved)
    assert "blocks.0.q: a LayerNorm is not linear" in str(error.value)
    assert "blocks.1.v: no such module" in str(error.value)


DIFFERENT = {
    "alpha": ({"alpha": 4.0}, "'alpha': (4.0, 5.0)"),
    "ranks": ({"r": 2}, "'r': ((2, 2, 2, 2), (1, 2, 3, 2))"),
    "gate": ({"gate": "sigmoid"}, "'gate': ('sigmoid', 'softmax')"),
    "top-k": ({"top_k": 1}, "'top_k': (1, 2)"),
    "renormalize": ({"renormalize": False}, "'renormalize': (False, True)"),
    "fewer-modules": ({"target_modules": ["q"]}, "blocks.0.v: only in the file"),
}


@pytest.mark.parametrize("fields, message", DIFFERENT.values(), ids=DIFFERENT)
def test_other_experts_than_the_models(saved, fields, message):
    model = trained(LoraMoeConfig(**{**CONFIG.to_dict(), **fields}), seed=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(model, saved)
    assert_unchanged(model, before)


def config_field(name, value):
    def change(info):
        sections = info["adapters"][0]
        section = next((s for s in sections.values() if isinstance(s, dict) and name in s), None)
        (sections["bank"] if section is None else section)[name] = value

    return change


def modules(*paths):
    def change(info):
        info["adapters"][0]["modules"] = list(paths)

    return change


LIES = {
    "no-description": (lambda info: " ", "expected JSON"),
    "no-object": (lambda info: "[]", "format version"),
    "depth": (lambda info: "[" * 5000, "expected a header"),
    "nested": (lambda info: "[" * 30 + " " * 600, "expected JSON"),
    "nan": (lambda info: '{"version": NaN}', "expected JSON"),
    "other-version": (lambda info: {**info, "version": 3}, "version 1 or 2, got 3"),
    "version-text": (lambda info: {**info, "version": "1"}, "version 1 or 2, got '1'"),
    "no-adapters": (lambda info: {**info, "adapters": []}, "module paths"),
    "adapters-no-list": (lambda info: {**info, "adapters": {}}, "expected a list of adapters"),
    "adapter-with-more": (
        lambda info: info["adapters"][0].update(x=1),
        "expected the sections bank, router",
    ),
    "bank-no-dict": (lambda info: info["adapters"][0].update(bank=[]), "expected bank with"),
    "router-unknown": (config_field("kind", "evil"), "expected a kind from"),
    "router-kind-no-text": (config_field("kind", ["token"]), "expected a kind from"),
    "context-unknown": (
        lambda info: info["adapters"][0].update(context={"x": 1}),
        "expected context with",
    ),
    "frozen-no-list": (config_field("frozen", 3), "list of frozen expert ids"),
    "frozen-outside": (config_field("frozen", [4]), r"\[0, 4\)"),
    "saved-modules-unknown": (
        lambda info: info.update(modules_to_save=["head"]),
        "modules_to_save",
    ),
    "saved-modules-no-list": (lambda info: info.update(modules_to_save={}), "module paths"),
    "unknown-field": (config_field("code", "import os"), "'code'"),
    "billion-experts": (config_field("num_experts", 10**9), "num_experts: expected"),
    "rank": (config_field("r", 2_000_000), "r: expected"),
    "alpha": (config_field("alpha", 1e38), "alpha: expected"),
    "alpha-text": (config_field("alpha", "__import__('os')"), "alpha: expected"),
    "module-twice": (modules("blocks.0.q", "blocks.0.q"), "expected unique module paths"),
    "module-dots": (modules("blocks..q"), "module paths"),
    "module-parent": (modules("../../etc/passwd"), "module paths"),
    "module-absolute": (modules("/etc/passwd"), "module paths"),
    "module-number": (modules(3), "module paths"),
    "module-dunder": (modules("blocks.__class__"), "no such module"),
    "module-is-a-container": (modules("blocks"), "ModuleList is not linear"),
}


@pytest.mark.parametrize("change, message", LIES.values(), ids=LIES)
def test_lying_descriptions_are_refused(saved, change, message):
    describe(saved, change)
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, saved)
    assert_unchanged(model, before)


def test_no_memory_is_taken_for_what_the_file_only_claims(saved):
    """A valid configuration with 4096 rank rows per module, in a file of a few kilobytes."""
    describe(saved, lambda info: [config_field(*f)(info) for f in (("r", [1024] * 4),)] and info)
    wide = nn.ModuleDict({"blocks": nn.ModuleList([Block(100_000), Block(100_000)]).to("meta")})
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"expected \(4096, 100000\)"):
        load_adapter(wide, saved)
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


LAST = "blocks.1.v.router.selection_bias"


def test_nothing_is_saved_that_would_be_refused(saved):
    model, before = trained(), (saved / FILE).read_bytes()
    with torch.no_grad():
        model.blocks[1].v.lora_B[-1, -1] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.1.v.lora_B: expected finite values"):
        save_adapter(model, saved)
    assert (saved / FILE).read_bytes() == before


def test_a_refused_file_is_read_into_less_than_twice_its_size(tmp_path):
    model = inject(Model(width=60_000), CONFIG)
    size = save_adapter(model, tmp_path).stat().st_size
    rewrite(tmp_path, lambda tensors: {**tensors, LAST: tensors[LAST] * float("nan")})
    assert size > 4 << 20
    fresh = Model(width=60_000)
    with measured() as cost, pytest.raises(ValueError, match="finite"):
        load_adapter(fresh, tmp_path)
    assert size / 2 < cost.rise < 1.2 * size + (4 << 20)


def test_other_safetensors_files(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="not a lora-moe adapter"):
        load_adapter(Model(), tmp_path)


def test_links_and_devices_are_refused(saved, tmp_path):
    for target in (saved / FILE, "/dev/zero", "../" + FILE):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / FILE).unlink(missing_ok=True)
        (folder / FILE).symlink_to(target)
        with pytest.raises(ValueError, match="a symbolic link"):
            load_adapter(Model(), folder)


@pytest.mark.parametrize("exists", [True, False])
def test_the_path_of_the_file_in_place_of_the_directory(tmp_path, exists):
    path, model = tmp_path / FILE, trained()
    if exists:
        save_adapter(model, tmp_path)
    before = path.read_bytes() if exists else None
    with pytest.raises(NotADirectoryError, match=f"pass the directory: {tmp_path}"):
        save_adapter(model, path)
    assert (path.read_bytes() if exists else None) == before and not path.is_dir()


def test_missing_files_say_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE):
        load_adapter(Model(), tmp_path / "nowhere")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin"):
        load_adapter(Model(), tmp_path)
    with pytest.raises(ValueError, match="pickles"):
        load_adapter(Model(), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        load_adapter(Model(), tmp_path)
