"""Importers: files created here in each format's layout, against the format's formula."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_moe
from lora_moe import adapter_info, injected, load_adapter, use_routing
from lora_moe.convert import FORMATS, convert
from lora_moe.convert import pickles as reader

from ..support.cost import measured

D, F, E, R = 8, 12, 4, 2  # hidden size, FFN size, experts, rank
SIZES = {"self_attn.q_proj": (D, D), "mlp.up_proj": (D, F), "mlp.down_proj": (F, D)}
PATHS = {f"model.layers.{i}.{name}": size for i in range(2) for name, size in SIZES.items()}
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (D_in, D_out) in SIZES.items():
            parent, last = name.split(".")
            getattr(self, parent).add_module(last, nn.Linear(D_in, D_out, bias=False))

    def forward(self, x):
        x = x + torch.tanh(self.self_attn.q_proj(x))
        return x + self.mlp.down_proj(torch.tanh(self.mlp.up_proj(x)))


class Model(nn.Module):
    """A tiny Llama's names around two blocks; its logits are of order one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(D, 11)
        self.double().eval()  # without dropout

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(x)


def by_formula(formula):
    """The logits of a model whose linear maps at PATHS add formula(path, x)."""
    model = Model()
    for path in PATHS:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, args, y, path=path: y + formula(path, args[0]))
    with torch.no_grad():
        return model(X)


def expect_formula(directory, formula):
    model = load_adapter(Model(), directory)
    with torch.no_grad():
        got, expected, base = model(X), by_formula(formula), Model()(X)
    assert (expected - base).abs().max() > 0.05  # the experts have a say
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= 1e-12, float(error)
    return model


def values(*shape, seed=[0]):  # noqa: B006
    seed[0] += 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed[0])) * 0.5


def saved(folder, config, tensors, kind="bin"):
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if kind == "bin":  # parameters, as a training run saves them
        tensors = {k: nn.Parameter(t) if t.is_floating_point() else t for k, t in tensors.items()}
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        safetensors.torch.save_file(
            {k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors"
        )
    return folder


def mix(x, weights, pairs, scale):
    """scale * sum_e weights_e B_e A_e x"""
    pairs = [(A.double(), B.double()) for A, B in pairs]
    return scale * sum(weights[..., e, None] * (x @ A.T @ B.T) for e, (A, B) in enumerate(pairs))


def logits_of(x, gate):
    return x @ gate.double().T


# --- the formats, each: (folder, formula, keyword arguments of convert) -------------------------------


def moe_peft(folder, kind="mola", file="bin", **fields):
    tensors, pairs, gates = {}, {}, {}
    for path, (D_in, D_out) in PATHS.items():
        name = path.replace("model.", f"{kind}.", 1)
        plain = kind == "loramoe" and "self_attn" in path
        pairs[path] = [(values(R, D_in), values(D_out, R)) for _ in range(1 if plain else E)]
        for e, (A, B) in enumerate(pairs[path]):
            middle = "" if plain else f"experts.{e}."
            tensors[f"{name}.{middle}lora_A.weight"] = A
            tensors[f"{name}.{middle}lora_B.weight"] = B
        if not plain:
            gates[path] = tensors[f"{name}.moe_gate.weight"] = values(E, D_in) * 4
    config = {"bias": "none", "peft_type": kind.upper(), "r": R, "lora_alpha": 6, "num_experts": E}
    config |= {"lora_dropout": 0.05, "target_modules": ["q_proj"], "routing_strategy": kind}
    config |= ({"top_k": 2} if kind == "mola" else {}) | fields

    def formula(path, x):
        if path not in gates:
            return mix(x, torch.ones(*x.shape[:-1], 1), pairs[path], 6 / root)
        p = torch.softmax(logits_of(x, gates[path]), -1)
        if kind == "mola":
            top, ids = p.topk(2, -1)
            p = torch.zeros_like(p).scatter(-1, ids, top / top.sum(-1, keepdim=True))
        return mix(x, p, pairs[path], 6 / root)

    root = math.sqrt(R) if fields.get("use_rslora") else R
    return saved(folder, config, tensors, file), formula, {}


def hydralora(folder, file="bin", **fields):
    tensors, A, B, gates = {}, {}, {}, {}
    for path, (D_in, D_out) in PATHS.items():
        name = f"base_model.model.{path}"
        A[path] = tensors[f"{name}.lora_A.weight"] = values(R, D_in)
        B[path] = [values(D_out, R) for _ in range(E)]
        tensors |= {f"{name}.lora_B{i}.weight": b for i, b in enumerate(B[path])}
        gates[path] = tensors[f"{name}.lora_route.weight"] = values(E, D_in) * 4
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 5, "lora_nums": E, "lora_dropout": 0.1}
    config |= {"blc_alpha": 0.0, "blc_weight": 0.0, "merge_weights": False, "enable_lora": None}
    config |= {"bias": "none", "modules_to_save": None, "fan_in_fan_out": False} | fields

    def formula(path, x):
        p = torch.softmax(logits_of(x, gates[path]), -1)
        return mix(x, p, [(A[path], b) for b in B[path]], 5 / R)

    return saved(folder, config, tensors, file), formula, {}


def coin(folder, file="bin", adapter="", second=True, **fields):
    tensors, pairs, gates = {}, {}, {}
    for path, (D_in, D_out) in PATHS.items():
        name = f"base_model.model.{path}"
        pairs[path] = [(values(R, D_in), values(D_out, R)) for _ in range(E)]
        for e, pair in enumerate(pairs[path]):
            for letter, t in zip("AB", pair):
                key = f"{name}.lora_{letter}{adapter}.lora{letter}.{e}"
                tensors[f"{key}.mlp.weight"] = t
                if second:
                    tensors[f"{key}.weight"] = t if file == "bin" else t.clone()
        gates[path] = tensors[f"{name}.lora_router{adapter}.weight"] = values(E, D_in) * 4
    config = {"peft_type": "MOE_LORA_CoIN", "r": R * E, "lora_alpha": 24, "expert_num": E}
    config |= {"task_embedding_dim": 64, "lora_dropout": 0.05, "bias": "none"} | fields

    def formula(path, x):
        return mix(x, torch.softmax(logits_of(x, gates[path]), -1), pairs[path], 24 / (R * E))

    return saved(folder, config, tensors, file), formula, {}


def meteora(folder, file="bin", **fields):
    tensors, pairs, gates, ranks = {}, {}, {}, (2, 3, 1, 2)
    for path, (D_in, D_out) in PATHS.items():
        name = f"base_model.model.{path}"
        pairs[path] = [(values(r, D_in), values(D_out, r)) for r in ranks]
        tensors[f"{name}.lora_A.weight"] = torch.cat([A for A, _ in pairs[path]])
        tensors[f"{name}.lora_B.weight"] = torch.cat([B for _, B in pairs[path]], 1)
        gates[path] = tensors[f"{name}.moe_gate.weight"] = values(E, D_in) * 4
        tensors[f"{name}.base_layer.weight"] = torch.zeros(D_out, D_in)
    tensors["base_model.model.model.norm.weight"] = torch.ones(D)
    adapters = []
    for i, r in enumerate(ranks):
        adapters.append(folder / f"lora{i}")
        config = {"peft_type": "LORA", "r": r, "lora_alpha": 4 + i, "lora_dropout": 0.1}
        adapters[-1].mkdir(parents=True)
        (adapters[-1] / "adapter_config.json").write_text(json.dumps(config | fields))
    if file == "bin":
        torch.save({"model": tensors}, folder / "meteora.pt")
    source = folder / "meteora.pt" if file == "bin" else saved(folder, None, tensors, file)

    def formula(path, x):
        top, ids = logits_of(x, gates[path]).topk(2, -1)
        p = x.new_zeros(*x.shape[:-1], E).scatter(-1, ids, torch.softmax(top, -1))
        by_scale = [(A.double() * (4 + i) / len(A), B) for i, (A, B) in enumerate(pairs[path])]
        return mix(x, p, by_scale, 1.0)

    return source, formula, {"adapters": adapters}


MADE = {
    "loramoe": lambda folder, **f: moe_peft(folder, "loramoe", **f),
    "mola": moe_peft,
    "hydralora": hydralora,
    "coin": coin,
    "meteora": meteora,
}


@pytest.mark.parametrize("file", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", MADE)
def test_the_formulas_logits(tmp_path, kind, file):
    source, formula, options = MADE[kind](tmp_path / "source", file=file)
    converted = convert(source, tmp_path / "out", **options)
    assert converted.format == kind and converted.paths == (tmp_path / "out/lora_moe.safetensors",)
    expect_formula(tmp_path / "out", formula)
    again = convert(source, tmp_path / "again", format=kind, **options)
    assert again.paths[0].read_bytes() == converted.paths[0].read_bytes()


def test_scales_and_names_that_may_differ(tmp_path):
    source, formula, _ = moe_peft(tmp_path / "rs", use_rslora=True)
    convert(source, tmp_path / "a")
    expect_formula(tmp_path / "a", formula)
    source, formula, _ = coin(tmp_path / "named", adapter=".default", second=False)
    convert(source, tmp_path / "b")
    expect_formula(tmp_path / "b", formula)


def test_what_trains_on_is_as_it_was(tmp_path):
    source, *_ = moe_peft(tmp_path / "mola", router_loss=True, router_aux_loss_coef=0.01, top_k=2)
    convert(source, tmp_path / "a")
    model = load_adapter(Model(), tmp_path / "a")
    config = injected(model)["model.layers.0.mlp.up_proj"].config
    assert config.balance_coef == 0.02 and config.z_coef == 0 and config.dropout == 0.05
    # MoE-PEFT's loss is E sum_e P_e * (share of tokens that took e), K where it is balanced
    with torch.enable_grad():
        model(X)
        routing = injected(model)["model.layers.0.mlp.up_proj"].routing
    p = torch.softmax(routing.logits, -1)
    taken = nn.functional.one_hot(p.topk(2, -1).indices, E).float()  # (T, K, E)
    theirs = 0.01 * E * (taken.mean(0) * p.mean(0)).sum()
    ours = config.balance_coef * lora_moe.losses.load_balance_loss(routing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    source, *_ = moe_peft(tmp_path / "without")
    convert(source, tmp_path / "b")
    assert adapter_info(tmp_path / "b")["adapters"][0]["config"].balance_coef == 0
    source, *_ = hydralora(tmp_path / "hydra", blc_weight=0.1)
    assert "blc_weight=0.1" in convert(source, tmp_path / "c").notes[0]


def test_dtypes_are_kept(tmp_path):
    source, *_ = hydralora(tmp_path / "a")
    state = torch.load(source / "adapter_model.bin", weights_only=True)
    torch.save({k: t.bfloat16() for k, t in state.items()}, source / "adapter_model.bin")
    convert(source, tmp_path / "out")
    assert {t.dtype for t in adapter_info(tmp_path / "out")["tensors"].values()} == {"BF16"}
    load_adapter(Model(), tmp_path / "out")


# --- PEFT and back -----------------------------------------------------------------------------------


def lora_folders(folder):
    formulas, shapes = [], list(PATHS.items())
    for i in (0, 1, 10, 2):  # in the order in which a directory may list them
        tensors, own = {}, {}
        for path, (D_in, D_out) in shapes[: 3 + i % 4]:
            own[path] = values(2 + i % 2, D_in), values(D_out, 2 + i % 2)
            for letter, t in zip("AB", own[path]):
                tensors[f"base_model.model.{path}.lora_{letter}.weight"] = t
        r, alpha = 2 + i % 2, 8 + i
        config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": i == 10}
        saved(folder / f"expert_{i}", config, tensors, "bin" if i == 1 else "safetensors")
        scale = alpha / (math.sqrt(r) if i == 10 else r)
        formulas.append((i, own, scale))
    return [(own, scale) for _, own, scale in sorted(formulas, key=lambda entry: entry[0])]


def test_peft_to_a_bank_and_back(tmp_path):
    loras = lora_folders(tmp_path / "loras")
    converted = convert(tmp_path / "loras", tmp_path / "bank", top_k=1)
    assert converted.format == "peft" and "routers are new" in converted.notes[0]

    def formula(own, scale):
        return lambda path, x: mix(x, torch.ones(2, 5, 1), [own[path]], scale) if path in own else 0

    def expect(model):
        for i, (own, scale) in enumerate(loras):
            with torch.no_grad(), use_routing(model, task_ids=torch.full((2,), i)):
                torch.testing.assert_close(model(X), by_formula(formula(own, scale)))

    expect(load_adapter(Model(), tmp_path / "bank"))
    back = convert(tmp_path / "bank", tmp_path / "folders")
    assert back.format == "lora_moe"
    assert [p.name for p in back.paths] == [f"expert_{i}" for i in range(4)]
    expect(lora_moe.from_peft(Model(), back.paths))
    convert(tmp_path / "folders", tmp_path / "again", top_k=1)
    expect(load_adapter(Model(), tmp_path / "again"))


def test_one_adapter_that_is_a_pickle(tmp_path):
    own, scale = lora_folders(tmp_path / "loras")[1]
    convert(tmp_path / "loras/expert_1", tmp_path / "bank")
    model = load_adapter(Model(), tmp_path / "bank")
    expected = by_formula(
        lambda path, x: mix(x, torch.ones(2, 5, 1), [own[path]], scale) if path in own else 0
    )
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)


# --- what is not understood --------------------------------------------------------------------------


def changed(source, change):
    """The file of tensors again, changed by change(state)."""
    path = source if source.is_file() else source / "adapter_model.bin"
    state = torch.load(path, weights_only=True)
    inner = state.get("model", state)
    change(inner)
    torch.save(state, path)


@pytest.mark.parametrize("kind", MADE)
def test_unknown_tensors_are_refused_by_name(tmp_path, kind):
    source, _, options = MADE[kind](tmp_path / "source")
    path = "model.layers.0.mlp.up_proj.lora_magnitude_vector.weight"
    changed(source, lambda state: state.update({path: torch.ones(3), "lora_extra": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"(?s)tensor .*lora_magnitude_vector.*lora_extra"):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["loramoe", "mola", "hydralora", "coin"])
def test_unknown_fields_are_refused_by_name(tmp_path, kind):
    source, *_ = MADE[kind](tmp_path / "source", use_dora=True, modules_to_save=["lm_head"])
    with pytest.raises(
        ValueError, match=r"use_dora=True.*modules_to_save=\['lm_head'\]|modules_to"
    ):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MISFITS = {
    "loramoe": [
        ("experts.3.lora_A.weight", None, r"missing \['3\.A'\]"),
        ("moe_gate.weight", torch.ones(E + 1, D), r"expected \(4, 8\), got \(5, 8\)"),
        ("experts.0.lora_B.weight", torch.ones(F, R + 1), r"expected \(D_out, 2\), got \(12, 3\)"),
    ],
    "mola": [
        ("experts.1.lora_A.weight", torch.ones(R, D + 1), "expected experts of one size"),
        ("experts.1.lora_A.weight", torch.ones(R, D, dtype=torch.int64), "expected one of"),
        ("experts.1.lora_A.weight", torch.full((R, D), math.nan), "finite"),
    ],
    "hydralora": [
        ("lora_B2.weight", None, r"expected lora_A, lora_route and lora_B0"),
        ("lora_A.weight", torch.ones(R + 1, D), r"expected \(2, D_in\), got \(3, 8\)"),
        ("lora_route.weight", torch.ones(E), r"expected \(4, 8\), got \(4,\)"),
    ],
    "coin": [
        ("loraA.2.mlp.weight", None, "expected loraA and loraB of each expert"),
        ("loraA.2.weight", torch.ones(R, D), "expected the values of"),
        ("lora_router.weight", None, "and a router"),
    ],
    "meteora": [
        ("lora_A.weight", torch.ones(3, D), r"expected \(8, D_in\)"),
        ("moe_gate.weight", torch.ones(E, D + 1), "one row per adapter"),
        ("lora_B.weight", None, "expected moe_gate, lora_A and lora_B"),
    ],
}


@pytest.mark.parametrize(("kind", "case"), [(k, i) for k in MISFITS for i in range(3)])
def test_tensors_that_do_not_fit(tmp_path, kind, case):
    end, value, message = MISFITS[kind][case]
    source, _, options = MADE[kind](tmp_path / "source")

    def change(state):
        key = next(
            k
            for k in state
            if k.endswith(f"layers.0.mlp.up_proj.{end}") or (end in k and "up" in k)
        )
        del state[key]
        if value is not None:
            state[key] = value

    changed(source, change)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


ANYTHING = (True, 10**12, "2", [1], {"a": 1})
FIELDS = {
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
    ),
    *("num_experts", "top_k", "router_loss", "router_aux_loss_coef", "lora_nums", "expert_num"),
}


@pytest.mark.parametrize("kind", [*MADE, "peft"])
def test_fields_may_hold_anything(tmp_path, kind):
    if kind == "peft":
        lora_folders(tmp_path / "source")
        source, options, folder = tmp_path / "source", {}, tmp_path / "source/expert_0"
    else:
        source, _, options = MADE[kind](tmp_path / "source")
        folder = options.get("adapters", [source])[0]
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for field in sorted(FIELDS):
        for value in ANYTHING:
            file.write_text(json.dumps(config | {field: value}))
            try:
                convert(source, tmp_path / "out", **options)
            except ValueError as error:
                assert len(str(error)) < 3000, error


def test_other_formats_and_options(tmp_path):
    source, *_ = saved(tmp_path / "ia3", {"peft_type": "IA3"}, {"a": X}), None
    with pytest.raises(ValueError, match=r"expected one of the formats .* got peft_type 'IA3'"):
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match=f"format: expected one of .*{FORMATS[0]}"):
        convert(source, tmp_path / "out", format="gguf")
    source, _, options = meteora(tmp_path / "meteora")
    with pytest.raises(ValueError, match="adapters: expected the folders of the LoRAs"):
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="the ranks of 3 adapters together"):
        convert(source, tmp_path / "out", adapters=options["adapters"][:3])
    source, *_ = hydralora(tmp_path / "hydra")
    with pytest.raises(ValueError, match="top_k: expected None for hydralora"):
        convert(source, tmp_path / "out", top_k=2)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/__0_0.distcp").touch()
    with pytest.raises(FileNotFoundError, match="dcp_to_torch_save"):
        convert(tmp_path / "dcp", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_weights_beside_it_are_named(tmp_path):
    source, *_ = coin(tmp_path / "source")
    (source / "non_lora_trainables.bin").touch()
    assert "non_lora_trainables.bin beside it" in convert(source, tmp_path / "out").notes[-1]


@pytest.mark.parametrize("path", ["training", "model.layers.0.mlp.up_proj.inner", "__class__.x"])
def test_paths_that_no_module_has(tmp_path, path):
    source, *_ = hydralora(tmp_path / "source")

    def change(state):
        for key in [k for k in state if "layers.1.mlp.down_proj" in k]:
            state[f"{path}.{key.partition('down_proj.')[2]}"] = state.pop(key)

    changed(source, change)
    with pytest.raises(ValueError, match=f"{path}: expected a module's path"):
        convert(source, tmp_path / "out")


# --- hostile files -----------------------------------------------------------------------------------


class Trace:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_not_run(tmp_path):
    source, *_ = hydralora(tmp_path / "source")
    trace = tmp_path / "trace"
    changed(source, lambda state: state.update({"evil": Trace(trace)}))
    with pytest.raises(ValueError, match=r"mkdir.*it was not loaded"):
        convert(source, tmp_path / "out")
    assert not trace.exists()
    torch.load(source / "adapter_model.bin", weights_only=False)
    assert trace.exists()  # it would have run


def archive(path, pickled, compression=zipfile.ZIP_STORED, records=()):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in records:
            file.writestr(f"archive/{name}", content)


GLOBAL = b"\x80\x02c%s\n%s\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQ"


def rebuilt(shape, strides):
    """A pickle of {"a": a tensor of one stored value, with this shape and these strides}."""
    numbers = [
        b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in part) + b"t"
        for part in (shape, strides)
    ]
    head = b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n("
    return head + STORAGE + b"K\0" + b"".join(numbers) + b"\x89}tRs."


HOSTILE = {
    "bytearray": (GLOBAL % (b"__builtin__", b"bytearray") + b"J\0\0\0\x40\x85R.", "bytearray"),
    "tensor of any size": (GLOBAL % (b"torch", b"Tensor") + b"J\0\0\0\x40\x85R.", "torch Tensor"),
    "expanded": (rebuilt((1 << 20, 1 << 10), (0, 0)), "contiguous"),
    "beyond its record": (rebuilt((1 << 20, 1 << 10), (1 << 10, 1)), "state dict"),
    "many steps": (b"\x80\x02" + b"N0" * (1 << 20), "POP"),
    "many allowed steps": (b"\x80\x02" + b"N" * (1 << 20) + b".", "steps"),
    "long": (b"\x80\x02" + b"N" * (5 << 20) + b".", "one data.pkl of at most"),
    "shared tuples": (b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b".", "a shared tuple"),
    "truncated": (b"\x80\x02}X\xff\0\0\0a", "damaged"),
    "empty": (b"", "damaged"),
    "number": (b"\x80\x02K\1.", "a dict of tensors"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_cost_little(tmp_path, kind):
    pickled, message = HOSTILE[kind]
    path = tmp_path / "adapter_model.bin"
    archive(
        path, pickled, records=[("data/0", b"\0" * 4), ("byteorder", b"little"), ("version", b"3")]
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    size = path.stat().st_size
    with measured() as cost, pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "out")
    assert cost.seconds < 1 and cost.rise < 2 * size + (64 << 20)


def test_hostile_archives_cost_little(tmp_path):
    path = tmp_path / "adapter_model.bin"
    made = {
        "0 compressed": lambda: archive(path, b"\0" * (5 << 20)),
        "2 compressed": lambda: archive(
            path, b"\x80\x02}.", zipfile.ZIP_DEFLATED, [("data/0", b"\0" * (1 << 26))]
        ),
        "list of records": lambda: archive(
            path, b"", records=[(f"{i:060000}", b"") for i in range(40)]
        ),
        "an archive of torch.save": lambda: path.write_bytes(pickle.dumps({"a": 1}, 2)),
        "expected an archive": lambda: path.write_bytes(b"PK" + b"\0" * 1000),
        "one data.pkl": lambda: zipfile.ZipFile(path, "w").close(),
    }
    for message, make in made.items():
        make()
        size = path.stat().st_size
        with measured() as cost, pytest.raises(ValueError, match=message):
            reader.read_pickle(path)
        assert cost.seconds < 1 and cost.rise < 2 * size + (64 << 20), message
    path.unlink()
    path.symlink_to(tmp_path / "other.bin")
    with pytest.raises(ValueError, match="symbolic link"):
        reader.read_pickle(path)


@pytest.mark.parametrize("file", ["bin", "safetensors"])
def test_damaged_files(tmp_path, file):
    source, *_ = moe_peft(tmp_path / "source", file=file)
    path = source / f"adapter_model.{file}"
    whole, refused = path.read_bytes(), 0
    for seed in range(120):
        rng, content = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(whole))
            content[at if seed % 3 else -1 - at % 2000] = rng.randrange(256)
        path.write_bytes(content if seed % 5 else content[: rng.randrange(len(whole))])
        try:
            convert(source, tmp_path / "out")
        except (ValueError, OSError) as error:
            refused += 1
            assert str(path) in str(error) or "expected" in str(error)
    assert 30 < refused < 120


def test_a_large_file_is_converted_within_its_memory(tmp_path):
    tensors = {}
    for e in range(E):
        tensors[f"base_model.model.a.lora_B{e}.weight"] = values(300_000, 4)
    tensors |= {
        "base_model.model.a.lora_A.weight": values(4, 8),
        "base_model.model.a.lora_route.weight": values(E, 8),
    }
    source = saved(tmp_path / "source", {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, tensors)
    size = (source / "adapter_model.bin").stat().st_size
    assert size > 16 << 20
    with measured() as cost:
        convert(source, tmp_path / "out")
    assert cost.rise < 2 * size + (64 << 20)


# --- the command line --------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    from lora_moe.cli import main

    source, formula, options = meteora(tmp_path / "source")
    adapters = ["--adapters", *map(str, options["adapters"])]
    assert main(["convert", str(source), str(tmp_path / "out"), *adapters]) == 0
    shown = capsys.readouterr().out
    assert (
        "meteora" in shown and "lora_moe.safetensors" in shown and "7 tensors of the base" in shown
    )
    expect_formula(tmp_path / "out", formula)
    assert main(["convert", str(source), str(tmp_path / "no")]) == 1
    assert "lora-moe convert: " in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "folders")]) == 0
    assert "expert_3" in capsys.readouterr().out
