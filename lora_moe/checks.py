"""Argument validation of the public functions; messages name the argument, what was expected, and the value.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import groupby, pairwise
from operator import index

import torch
from torch.autograd import forward_ad

from .reference import GATES, accumulator

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast_enabled(device_type: str) -> bool:
    """Like torch.is_autocast_enabled, which raises on devices without autocast, such as meta."""
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def floating_input(x, function, name="x"):
    """x, cast to autocast's dtype if autocast is enabled, as in nn.Linear."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")
    if x.dtype in FLOATS and x.dtype != torch.float64 and autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name}: {function} takes float32, float64, bfloat16 or float16, got {x.dtype}"
        )
    if x.dim() < 1:
        raise ValueError(f"{name}: expected (..., D_in), got a scalar")
    return x


def logits(values):
    """Logits (..., E) of any floating dtype as (T, E) in fp32 or fp64."""
    _floating("logits", values)
    if values.dim() < 1:
        raise ValueError("logits: expected (..., E), got a scalar")
    return values.reshape(-1, values.shape[-1]).to(accumulator(values.dtype))


def shape_is(name, tensor, expected, why=""):
    if tuple(tensor.shape) != tuple(expected):
        why = f", {why}" if why else ""
        raise ValueError(f"{name}: expected {tuple(expected)}{why}, got {tuple(tensor.shape)}")


def device_is(name, tensor, x, like="x"):
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like {like}, got {tensor.device}")


def matrix(name, tensor, x, shape, why="", like="x"):
    """Check for a dense floating tensor on x's device; None in `shape` allows any size."""
    if (  # the common case in a third of the time: a decoding step makes a thousand of these checks
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.dtype in FLOATS
        and tensor.device == x.device
        and _fits(tensor.shape, shape)
    ):
        return
    _floating(name, tensor)
    if len(shape) != tensor.dim():
        raise ValueError(f"{name}: expected {len(shape)} dimensions, got {tuple(tensor.shape)}")
    expected = [have if want is None else want for want, have in zip(shape, tensor.shape)]
    shape_is(name, tensor, expected, why)
    device_is(name, tensor, x, like)


def _floating(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    dtype, layout = tensor.dtype, tensor.layout
    if layout != torch.strided or dtype not in FLOATS:
        raise TypeError(f"{name}: expected a dense floating tensor, got {dtype} {layout}")


def _fits(have, shape):
    if len(have) != 2 or len(shape) != 2:
        return have == shape
    return shape[0] in (None, have[0]) and shape[1] in (None, have[1])


def router(x, router_weight, top_k, gate, bias, router_bias):
    matrix("router_weight", router_weight, x, (None, x.shape[-1]), "one column per feature of x")
    decision(x, router_weight.shape[0], top_k, gate, bias)
    if router_bias is not None:
        matrix("router_bias", router_bias, x, (router_weight.shape[0],), "one per expert")


def decision(x, E, top_k, gate, bias, like="x"):
    """Check the options that pick experts from the logits of E experts."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= E:
        raise ValueError(f"top_k: expected an integer in [1, {E}] for {E} experts, got {top_k!r}")
    if gate not in GATES:
        raise ValueError(f"gate: expected one of {GATES}, got {gate!r}")
    if bias is not None:
        matrix("bias", bias, x, (E,), "one per expert", like)


def rank_offsets_of(rank_offsets, num_experts: int) -> list[int]:
    """E + 1 ascending row offsets, from offsets or from one common rank; raises ValueError."""
    if isinstance(rank_offsets, int) and not isinstance(rank_offsets, bool):
        if rank_offsets < 1:
            raise ValueError(f"rank_offsets: expected a rank of at least 1, got {rank_offsets}")
        return [rank_offsets * e for e in range(num_experts + 1)]
    if isinstance(rank_offsets, (bool, str)) or not isinstance(rank_offsets, Sequence):
        raise ValueError(
            f"rank_offsets: expected an int or a sequence of {num_experts + 1} ints, got {rank_offsets!r}"
        )
    offsets = list(rank_offsets)
    if len(offsets) != num_experts + 1 or any(type(o) is not int for o in offsets):
        raise ValueError(
            f"rank_offsets: expected {num_experts + 1} ints for {num_experts} experts, got {offsets}"
        )
    if offsets[0] != 0 or any(b <= a for a, b in pairwise(offsets)):
        raise ValueError(f"rank_offsets: expected 0 first, then strictly ascending, got {offsets}")
    return offsets


def experts(x, lora_A, lora_B, num_experts, rank_offsets, shared_a, frozen, scaling):
    offsets = rank_offsets_of(rank_offsets, num_experts)
    R = offsets[-1]
    if shared_a:
        r = offsets[1]
        if any(b - a != r for a, b in pairwise(offsets)):
            raise ValueError(f"rank_offsets: expected equal ranks with shared_a, got {offsets}")
        matrix("lora_A", lora_A, x, (r, x.shape[-1]), "the shared rank's rows")
    else:
        matrix("lora_A", lora_A, x, (R, x.shape[-1]), "one row per rank row of rank_offsets")
    matrix("lora_B", lora_B, x, (R, None), "one row per rank row of rank_offsets")
    return offsets, frozen_ids(frozen, num_experts), scales_of(scaling, num_experts, x)


def base_weight(weight, x, D_out, base, slots=None):
    """Check base_weight: gradients are wrong if it trains, if base is None, or with slots."""
    if base is None or slots is not None:
        raise ValueError(
            "base_weight: expected None unless base is given and slots is None, got"
            f" base={'None' if base is None else 'a tensor'}, {slots=}"
        )
    shape_is("base_weight", weight, (D_out, x.shape[-1]), "as nn.Linear's weight")
    device_is("base_weight", weight, x)
    if weight.dtype != x.dtype or weight.requires_grad or base.requires_grad:
        raise ValueError(
            f"base_weight: expected a frozen {x.dtype} weight and a base without a graph, got {weight.dtype},"
            f" requires_grad={weight.requires_grad}, base.requires_grad={base.requires_grad}"
        )


def frozen_ids(frozen, num_experts):
    if isinstance(frozen, (int, str)) or not isinstance(frozen, Collection):
        raise TypeError(f"frozen: expected a collection of expert ids, got {frozen!r}")
    if any(type(e) is not int or not 0 <= e < num_experts for e in frozen):
        raise ValueError(f"frozen: expected expert ids in [0, {num_experts}), got {frozen!r}")
    return sorted(frozen)


def scales_of(scaling, num_experts, x):
    dtype = accumulator(x.dtype)
    if isinstance(scaling, torch.Tensor):
        matrix("scaling", scaling, x, (num_experts,), "one per expert")
        if scaling.dtype == dtype and not scaling.requires_grad and scaling.is_contiguous():
            return scaling
        return scaling.detach().to(dtype).contiguous()
    if _is_finite(scaling):  # filled on the device, without a copy from the host
        return torch.full((num_experts,), float(scaling), dtype=dtype, device=x.device)
    values = list(scaling) if isinstance(scaling, Sequence) else []
    if len(values) != num_experts or not all(_is_finite(v) for v in values):
        raise ValueError(
            f"scaling: expected a finite float or {num_experts} finite floats, got {scaling!r}"
        )
    if x.device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    # filled too: a copy from the host would abort a CUDA graph capture
    equal = [(float(v), len(list(same))) for v, same in groupby(values)]
    return torch.cat([torch.full((n,), v, dtype=dtype, device=x.device) for v, n in equal])


def _is_finite(value):
    """Like math.isfinite, which rejects the symbolic numbers of a tracer."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -math.inf < value < math.inf


def wrong_id(ids, E) -> int | None:
    """An id outside [-1, E), or None; reads the tensor's values."""
    low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (-1, -1)
    return low if low < -1 else high if high >= E else None


def sparsity(top_p, threshold, gate):
    """top_p and threshold as the operators expect them: None becomes a number that drops nothing."""
    if top_p is not None and (not _is_finite(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if top_p is not None and gate != "softmax":
        raise ValueError(f"top_p: expected gate='softmax', whose gates sum to 1, got {gate!r}")
    if threshold is not None and (not _is_finite(threshold) or not 0 <= threshold <= 1):
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold!r}")
    # literals: a tracer turns named numbers into symbols, and loses track of them between calls
    kept = 1e30 if top_p is None else _constant(top_p)
    return kept, 0.0 if threshold is None else _constant(threshold)


def _constant(number):
    """A plain number in [0, 1]; while tracing, through an integer, since only those can be specialized."""
    if torch.compiler.is_compiling():
        return index(int(number * 2**60)) / 2**60
    return float(number)


def selection(bias, x):
    return None if bias is None else bias.detach().to(accumulator(x.dtype)).contiguous()


def slots(routing, x, tokens):
    """Check the caller's routing for the tokens of x, and return K."""
    indices, weights = routing.indices, routing.weights
    for name, t in (("routing.indices", indices), ("routing.weights", weights)):
        if t.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {t.layout}")
        device_is(name, t, x)
    if indices.dtype != torch.int32:
        raise TypeError(f"routing.indices: expected int32, got {indices.dtype}")
    if weights.dtype not in FLOATS:
        raise TypeError(f"routing.weights: expected a floating dtype, got {weights.dtype}")
    if indices.dim() != 2:
        raise ValueError(f"routing.indices: expected (T, K), got {tuple(indices.shape)}")
    shape_is("routing.indices", indices, (tokens, indices.shape[1]), "one row per token of x")
    shape_is("routing.weights", weights, tuple(indices.shape), "as indices")
    return indices.shape[1]


def slot_rows(x, slots, shape):
    """The leading dimensions of the tokens; with slots="sum", x has one row per slot."""
    if slots not in (None, "apart", "sum"):
        raise ValueError(f"slots: expected 'apart', 'sum' or None, got {slots!r}")
    if slots != "sum":
        return x.shape[:-1]
    K = shape[1] if len(shape) == 2 else None
    if x.dim() < 2 or (K is not None and x.shape[-2] != K):
        raise ValueError(
            f"x: expected (..., K, D_in) with slots='sum' and K = {K}, got {tuple(x.shape)}"
        )
    return x.shape[:-2]


def first_order(*tensors):
    """Raise for derivatives other than reverse mode, which would be silently dropped."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if any(t is not None and wrapped(t) for t in tensors):
            raise RuntimeError(
                "lora_moe: torch.func's transforms (grad, vjp, jvp, vmap, jacrev, ...) are not implemented"
                " for the experts and the router; use torch.autograd.grad or backward, or the functions of"
                " lora_moe.reference, which support every transform"
            )
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            "lora_moe: forward-mode derivatives (torch.autograd.forward_ad) are not implemented for the"
            " experts and the router; use reverse mode, or lora_moe.reference, which supports both"
        )
