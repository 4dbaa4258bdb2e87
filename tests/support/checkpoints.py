"""Checkpoints in the layouts of other packages, each with its format's formula."""

from __future__ import annotations

import json
import math

import safetensors.torch
import torch
from torch import nn

D, F, E, R = 8, 12, 4, 2  # hidden size, FFN size, experts, rank
SIZES = {"self_attn.q_proj": (D, D), "mlp.up_proj": (D, F), "mlp.down_proj": (F, D)}
PATHS = {f"model.layers.{i}.{name}": size for i in range(2) for name, size in SIZES.items()}
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


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


def lora_folders(folder):
    formulas, shapes = [], list(PATHS.items())
    for i in (0, 1, 10, 2):  # as a directory may list them
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


def changed(source, change):
    """Rewrites a file of tensors after change(state)."""
    path = source if source.is_file() else source / "adapter_model.bin"
    state = torch.load(path, weights_only=True)
    inner = state.get("model", state)
    change(inner)
    torch.save(state, path)
