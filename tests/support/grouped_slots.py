"""grouped_lora with one row per slot: inputs, our call and the formula."""

from __future__ import annotations

import torch

from lora_moe import Routing
from lora_moe import functional as F

from . import eager
from .cases import sample
from .functions import experts_of

NAMES = ("x", "lora_A", "lora_B", "base", "weights")


def ids_of(case):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)
    ids[: case.T // 2, -1] = ids[: case.T // 2, 0]  # twice in a token
    ids[-1:] = -1  # a token without experts
    return ids


def inputs_of(case, dtype, form):
    v, g = sample(case, dtype), torch.Generator().manual_seed(4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    v["weights"] = torch.randn(case.T, case.K, generator=g, dtype=torch.float64).to(wide)
    per_slot = {"apart, a base per slot": "base", "sum": "x"}.get(form)
    if v.get(per_slot) is not None:
        shape = case.T, case.K, v[per_slot].shape[1]
        v[per_slot] = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return v


def ours(v, case, form, ids=None, **more):
    ids = ids_of(case) if ids is None else ids
    return F.grouped_lora(
        v["x"], v["lora_A"], v["lora_B"], Routing.from_ids(ids, v["weights"], num_experts=case.E),
        scaling=v["scaling"], base=v["base"], slots=form.split(",")[0], **experts_of(case), **more,
    )  # fmt: skip


def theirs(v, case, form):
    x = v["x"].flatten(0, 1) if form == "sum" else v["x"].repeat_interleave(case.K, 0)
    ids, weights = ids_of(case).view(-1, 1), v["weights"].reshape(-1, 1)
    y = eager.grouped_lora(
        x, v["lora_A"], v["lora_B"], ids, weights, case, None, v["scaling"]
    ).view(case.T, case.K, case.D_out)
    y, base = (y.sum(1) if form == "sum" else y), v["base"]
    if base is None:
        return y
    return y + (base[:, None] if form == "apart" else base)
