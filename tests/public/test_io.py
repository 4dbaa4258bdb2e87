"""Saving and loading adapters: either everything is loaded, or nothing changes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import lora_moe
from lora_moe import (
    LoraMoeConfig,
    LoraMoeLinear,
    adapter_info,
    inject,
    injected,
    load_adapter,
    save_adapter,
)

from ..support.cost import measured

FILE = "lora_moe.safetensors"
CONFIG = LoraMoeConfig(
    num_experts=4, r=[1, 2, 3, 2], alpha=5, selection_bias=True, target_modules=("q", "v")
)
KEYS = {
    f"blocks.{i}.{m}.{t}"
    for i in (0, 1)
    for m in "qv"
    for t in ("lora_A", "lora_B", "router.weight", "router.selection_bias")
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.v = nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, x):
        return self.v(torch.relu(self.q(x)))


class Model(nn.Module):
    def __init__(self, width=6, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.to(dtype)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def trained(config=CONFIG, seed=1, **fields):
    """A model whose adapters, routers and biases hold arbitrary values."""
    model = inject(Model(**fields), config)
    g = torch.Generator().manual_seed(seed)
    for layer in injected(model).values():
        for tensor in layer.adapter_state().values():
            tensor.detach().copy_(torch.randn(tensor.shape, generator=g))
    return model


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def rewrite(directory, change=None, metadata=None):
    """The saved file again, with its tensors changed and its description replaced."""
    path = Path(directory) / FILE
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        old = file.metadata()
    if change:
        tensors = change(tensors) or tensors
    safetensors.torch.save_file(tensors, path, old if metadata is None else metadata)


def describe(directory, change):
    """The saved file again, its description (a dict) changed by `change`."""
    with safetensors.safe_open(Path(directory) / FILE, "pt") as file:
        info = json.loads(file.metadata()["lora_moe"])
    info = change(info) or info
    rewrite(directory, metadata={"lora_moe": info if isinstance(info, str) else json.dumps(info)})


@pytest.fixture
def saved(tmp_path):
    save_adapter(trained(), tmp_path)
    return tmp_path


# --- round trips ---------------------------------------------------------------------------------


def test_into_a_fresh_model(saved):
    model, fresh = trained(), Model()
    assert load_adapter(fresh, saved) is fresh
    assert torch.equal(fresh(X), model(X))
    assert_unchanged(fresh, model.state_dict())
    assert [layer.config for layer in injected(fresh).values()] == [CONFIG] * 4
    training = {n.rpartition(".")[2] for n, p in fresh.named_parameters() if p.requires_grad}
    assert training == {"lora_A", "lora_B", "router_weight"}


def test_into_a_model_with_the_same_experts(saved):
    model, other = trained(), trained(seed=2)
    layers, parameters = injected(other), dict(other.named_parameters())
    assert not torch.allclose(other(X), model(X))
    load_adapter(other, saved)
    assert torch.equal(other(X), model(X))
    assert injected(other) == layers  # the same objects: an optimiser's references stay good
    assert all(other.get_parameter(n) is p for n, p in parameters.items())


def test_several_configurations(tmp_path):
    model = inject(Model(), LoraMoeConfig(num_experts=2, r=3, target_modules="blocks.0.q"))
    inject(model, LoraMoeConfig(num_experts=3, r=2, shared_a=True, target_modules=("1.v",)))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    fresh = load_adapter(Model(), tmp_path)
    assert torch.equal(fresh(X), model(X))
    assert [layer.config.num_experts for layer in injected(fresh).values()] == [2, 3]


def test_a_single_layer(tmp_path):
    layer, other = (LoraMoeLinear(nn.Linear(4, 4), CONFIG) for _ in range(2))
    nn.init.normal_(layer.lora_B)
    save_adapter(layer, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(other.lora_B, layer.lora_B)
    with pytest.raises(ValueError, match="the model itself"):
        load_adapter(nn.Linear(4, 4), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_model_decides_the_dtype(saved, dtype):
    fresh = load_adapter(Model(dtype=dtype), saved)
    for name, layer in injected(fresh).items():
        want = trained().get_submodule(name).lora_A
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert layer.lora_A.dtype == wide and torch.equal(layer.lora_A, want.to(wide))
    fresh = load_adapter(Model(dtype=dtype), saved, adapter_dtype="base")
    for name, layer in injected(fresh).items():
        want = trained().get_submodule(name).lora_A
        assert layer.lora_A.dtype == dtype and torch.equal(layer.lora_A, want.to(dtype))


def test_what_a_model_may_choose_for_itself(saved):
    own = LoraMoeConfig(**{**CONFIG.to_dict(), "dropout": 0.3, "balance_coef": 0.0})
    model = trained(own, seed=2)
    load_adapter(model, saved)
    assert injected(model)["blocks.0.q"].config == own
    assert torch.equal(model.eval()(X), trained()(X))


def test_adapter_info(saved):
    info = adapter_info(saved)
    assert info["version"] == 2 and info["library"] == lora_moe.__version__
    (adapter,) = info["adapters"]
    assert adapter["config"] == CONFIG
    assert adapter["modules"] == ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]
    assert info["tensors"].keys() == KEYS
    assert info["tensors"]["blocks.0.q.lora_A"][:2] == ("F32", (8, 6))


def test_the_base_is_not_in_the_file(saved):
    assert safetensors.torch.load_file(saved / FILE).keys() == KEYS


VERSION_1 = {  # as 0.1 wrote it, all fields there were
    "num_experts": 4, "r": [1, 2, 3, 2], "top_k": 2, "alpha": 5.0, "dropout": 0.0, "gate": "softmax",
    "renormalize": True, "shared_a": False, "selection_bias": True, "target_modules": ["q", "v"],
    "exclude_modules": [], "balance_coef": 0.01, "z_coef": 0.001,
}  # fmt: skip


def as_version_1(directory, fields=VERSION_1):
    """The saved file as version 1 had it: a flat configuration and the layer's own names."""
    names = {"router.weight": "router_weight", "router.selection_bias": "selection_bias"}

    def rename(tensors):
        for new, old in names.items():
            tensors = {k.replace(f".{new}", f".{old}"): t for k, t in tensors.items()}
        return tensors

    modules = adapter_info(directory)["adapters"][0]["modules"]
    adapters = [{"config": fields, "modules": modules}]
    info = {"version": 1, "library": "0.1.0", "adapters": adapters}
    rewrite(directory, rename, {"format": "pt", "lora_moe": json.dumps(info)})


@pytest.mark.parametrize("injected_before", [False, True])
def test_files_of_version_1_load_with_the_same_results(saved, injected_before):
    as_version_1(saved)
    model = load_adapter(trained(seed=2) if injected_before else Model(), saved)
    assert torch.equal(model(X), trained()(X))
    assert adapter_info(saved)["version"] == 1


def test_version_1_renormalized_unless_it_said_otherwise(saved):
    fields = {k: v for k, v in VERSION_1.items() if k != "renormalize"} | {"top_k": 1}
    as_version_1(saved, fields)
    (adapter,) = adapter_info(saved)["adapters"]
    assert adapter["config"].normalizes and adapter["config"].top_k == 1
    as_version_1(saved, VERSION_1 | {"temperature": 2.0})
    with pytest.raises(ValueError, match=r"fields of version 1, got .*temperature"):
        adapter_info(saved)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        save_adapter(Model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- files that do not fit -----------------------------------------------------------------------

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
    "extra": (put("evil", torch.zeros(1)), ["'evil': not the model's"]),
    "extra-control-characters": (put("\x1b[2J", torch.zeros(1)), [r"'\\x1b\[2J': not"]),
    "base-weight": (put("blocks.0.q.weight", torch.zeros(8, 6)), ["not the model's"]),
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
    "adapters-no-list": (lambda info: {**info, "adapters": {}}, "expected adapters"),
    "adapter-with-more": (lambda info: info["adapters"][0].update(x=1), "expected bank, router"),
    "bank-no-dict": (lambda info: info["adapters"][0].update(bank=[]), "expected bank of"),
    "router-unknown": (config_field("kind", "evil"), "expected a kind of"),
    "router-kind-no-text": (config_field("kind", ["token"]), "expected a kind of"),
    "context-unknown": (lambda info: info["adapters"][0].update(context={"x": 1}), "context of"),
    "frozen-no-list": (config_field("frozen", 3), "list of frozen experts"),
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
    "module-twice": (modules("blocks.0.q", "blocks.0.q"), "each once"),
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
    """A valid configuration of 64 Ki rows for each module, in a file of a few kilobytes."""
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


# --- files that are not ours ---------------------------------------------------------------------


def test_other_safetensors_files(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="no lora-moe adapter"):
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
    with pytest.raises(FileNotFoundError, match=r"without adapter_model\.safetensors"):
        load_adapter(Model(), tmp_path)


# --- a kill in the middle of a save --------------------------------------------------------------

SAVE_FOREVER = """
import sys, torch
from tests.public.test_io import trained
from lora_moe import injected, save_adapter
model = trained()
print("ready", flush=True)
value = 0
while True:
    value = 1 - value
    for layer in injected(model).values():
        for tensor in layer.adapter_state().values():
            tensor.detach().fill_(value)
    save_adapter(model, sys.argv[1])
"""


def test_a_kill_during_a_save_leaves_one_whole_version(saved):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SAVE_FOREVER, str(saved)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    fresh = load_adapter(Model(), saved)
    values = {
        float(v) for layer in injected(fresh).values() for v in layer.lora_B.detach().flatten()
    }
    assert values in ({0.0}, {1.0})
    # beside what the killed write leaves: our own temporary file, or the one that safetensors makes for it
    left = {
        name for name in os.listdir(saved) if not (name.endswith(".tmp") or name.startswith(".tmp"))
    }
    assert left == {FILE, "README.md"}
