"""The public functions: tensors in, tensors out, every argument checked here and only here.

    y_t = base_t + sum over e in topk(router(x_t)) of  g_te * s_e * B_e A_e x_t

Letters: T tokens (all leading dimensions of x together), E experts, K picked experts a token,
R rank rows of all experts together, r one expert's rank, D_in and D_out the linear's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

import torch

from . import autograd, backend, plan
from .reference import accumulator
from .routing import Routing

__all__ = ["expand", "grouped_lora", "routed_lora", "router_topk", "shrink"]

GATES = ("softmax", "sigmoid")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ops = torch.ops.lora_moe


def router_topk(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    top_k: int,
    *,
    gate: str = "softmax",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    router_bias: torch.Tensor | None = None,
) -> Routing:
    """Pick top_k experts per token:  ids = top-k of p + bias,  weights = p[ids];  p = gate(x W^T + c).

    Args:
        x: (..., D_in), fp32, fp64, bf16 or fp16.
        router_weight: (E, D_in), x's dtype or wider; its products are always full fp32 (fp64).
        top_k: K in [1, E].  K = E is the dense mixture.
        gate: "softmax" over all E, or "sigmoid" of each logit.
        renormalize: divide the K weights by their sum; with softmax this equals a softmax over the
            picked logits.
        bias: (E,), added to p for the selection only, not to the weights; takes no gradient
            (DeepSeek-V3's loss-free balancing, arXiv 2408.15664).
        top_p: in (0, 1]: a token takes its picked experts, best first, until their gates sum to top_p;
            the rest of the K slots stay empty.  Softmax only (MixLoRA's top-p router).
        threshold: in [0, 1]: picked experts with a smaller gate are dropped, all of them perhaps.
        router_bias: c (E,), floating, added to the logits; differentiable, its gradient in its own dtype.
    Returns:
        Routing with every field, router_bias in its logits; T is the product of x's leading dimensions.
        Ties go to the lower expert id; a NaN logit is picked last and never yields an invalid id.
    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected
            and what was received.
    """
    x = _input(x, "router_topk")
    _router(x, router_weight, top_k, gate, bias, router_bias)
    rows, selection = _rows(x), _selection(bias, x)
    options = top_k, gate, bool(renormalize), *_sparsity(top_p, threshold, gate)
    if _needs_graph(x, router_weight, router_bias):
        out = autograd.RouterTopK.apply(rows, router_weight, selection, router_bias, *options)
    else:
        w = autograd.router_operand(router_weight, x)
        router_bias = autograd.router_bias_operand(router_bias, x)
        out = _ops.router_topk(rows, w, selection, router_bias, *options)
    return _routing(*out)


def grouped_lora(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    routing: Routing,
    *,
    rank_offsets: Sequence[int] | int,
    scaling: float | Sequence[float] | torch.Tensor = 1.0,
    shared_a: bool = False,
    base: torch.Tensor | None = None,
    frozen: Sequence[int] = (),
) -> torch.Tensor:
    """Experts with the routing given:  y_t = base_t + sum over slots j of  w_tj s_e B_e A_e x_t,  e = ids_tj.

    Args:
        x: (..., D_in), fp32, fp64, bf16 or fp16.
        lora_A: (R, D_in), the experts' rows one under the other; (r, D_in) with shared_a.
        lora_B: (R, D_out), row r pairs with row r of lora_A.
        routing: for the T tokens of x; Routing.from_ids, Routing.from_gates or router_topk.
        rank_offsets: E + 1 ascending integers, expert e owns rows [o_e, o_e+1); or an int r: every
            expert has rank r.
        scaling: s, one float, or one per expert: a sequence or an (E,) tensor.  Takes no gradient.
        shared_a: all experts read the same A (HydraLoRA, BranchLoRA); all ranks are then r.
        base: (..., D_out) of x's dtype, added to the result; never changed in place.
        frozen: expert ids whose rows of lora_B (and lora_A) get an exactly zero gradient.
    Returns:
        y (..., D_out) in x's dtype.  A token without experts equals base bit for bit (0 without).
    Raises:
        ValueError, TypeError: an argument does not fit.
        ValueError, RuntimeError: an expert id outside [-1, E) on a CPU; on a GPU it is masked.
    """
    x = _input(x, "grouped_lora")
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a lora_moe.Routing, got {type(routing).__name__}")
    E, top_k = routing.num_experts, routing.indices.shape[1]
    offsets, frozen, scales = _experts(
        x, lora_A, lora_B, E, rank_offsets, shared_a, frozen, scaling
    )
    rows = _rows(x)
    _shape("routing.indices", routing.indices, (rows.shape[0], top_k), "one row per token of x")
    _shape("routing.weights", routing.weights, tuple(routing.indices.shape), "as indices")
    _device("routing", routing.indices, x)
    weights = routing.weights.to(accumulator(x.dtype))
    chosen = _plan(rows, lora_B, offsets, top_k, shared_a)
    args = (
        _base(base, x, lora_B),
        routing.indices.contiguous(),
        weights.contiguous(),
        scales,
        offsets,
        bool(shared_a),
    )
    if _needs_graph(x, lora_A, lora_B, base, weights):
        y = autograd.GroupedLora.apply(rows, lora_A, lora_B, *args, frozen, chosen)
    else:
        y, _ = _ops.grouped_lora(
            rows, *map(autograd.rows_contiguous, (lora_A, lora_B)), *args, chosen
        )
    return _like(x, y)


def routed_lora(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    top_k: int,
    *,
    rank_offsets: Sequence[int] | int,
    scaling: float | Sequence[float] | torch.Tensor = 1.0,
    shared_a: bool = False,
    base: torch.Tensor | None = None,
    gate: str = "softmax",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    frozen: Sequence[int] = (),
    router_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routing]:
    """Router, top-k and experts in a single pass over x:  grouped_lora(x, ..., router_topk(x, ...)).

        y_t = base_t + sum over e in topk(router(x_t)) of  g_te * s_e * B_e A_e x_t

    Args:
        As router_topk and grouped_lora.
    Returns:
        y (..., D_out) in x's dtype, and the Routing taken; both differentiable.
    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected
            and what was received.
    """
    if top_p is None and threshold is None and type(rank_offsets) is int:
        quick = routed_lora_at_once(
            x, router_weight, lora_A, lora_B, top_k, rank_offsets, scaling, shared_a, base,
            gate, renormalize, bias, router_bias,
        )  # fmt: skip
        if quick is not None:
            return quick
    x = _input(x, "routed_lora")
    _router(x, router_weight, top_k, gate, bias, router_bias)
    offsets, frozen, scales = _experts(
        x, lora_A, lora_B, router_weight.shape[0], rank_offsets, shared_a, frozen, scaling
    )
    rows = _rows(x)
    chosen = _plan(rows, lora_B, offsets, top_k, shared_a)
    added = _base(base, x, lora_B), _selection(bias, x)
    options = (
        scales,
        offsets,
        bool(shared_a),
        top_k,
        gate,
        bool(renormalize),
        *_sparsity(top_p, threshold, gate),
    )
    if _needs_graph(x, router_weight, lora_A, lora_B, base, router_bias):
        y, *routing = autograd.RoutedLora.apply(
            rows, router_weight, lora_A, lora_B, *added, router_bias, *options, frozen, chosen
        )
    else:
        w = autograd.router_operand(router_weight, x)
        adapter = map(autograd.rows_contiguous, (lora_A, lora_B))
        router_bias = autograd.router_bias_operand(router_bias, x)
        y, *routing, _ = _ops.routed_lora(rows, w, *adapter, *added, router_bias, *options, chosen)
    return _like(x, y), _routing(*routing)


def shrink(
    x: torch.Tensor, lora_A: torch.Tensor, router_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S = x A^T and, in the same pass over x, logits = x W^T.

    Args:
        x: (..., D_in).
        lora_A: (R, D_in).
        router_weight: (E, D_in) or None.
    Returns:
        S (T, R) and logits (T, E) or None, both fp32, or fp64 when x is.
    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    x = _input(x, "shrink")
    _matrix("lora_A", lora_A, x, (None, x.shape[-1]))
    if router_weight is not None:
        _matrix("router_weight", router_weight, x, (None, x.shape[-1]))
    rows = _rows(x)
    if _needs_graph(x, lora_A, router_weight):
        s, logits = autograd.Shrink.apply(rows, lora_A, router_weight)
    else:
        w = None if router_weight is None else autograd.router_operand(router_weight, x)
        s, logits = _ops.shrink(rows, *autograd.rounded(x, lora_A), w)
    return s, None if router_weight is None else logits


def expand(H: torch.Tensor, lora_B: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """y = base + H B, summed in fp32 (fp64) and rounded once.

    Args:
        H: (T, R), floating.
        lora_B: (R, D_out).
        base: (..., D_out) with T rows in all, or None.
    Returns:
        y of base's shape and dtype; without a base (T, D_out) in lora_B's dtype.
    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    H = _input(H, "expand", name="H")
    if H.dim() != 2:
        raise ValueError(f"H: expected (T, R), got {tuple(H.shape)}")
    _matrix("lora_B", lora_B, H, (H.shape[1], None), "one row per column of H")
    D_out = lora_B.shape[1]
    dtype = lora_B.dtype if base is None else base.dtype
    rows = None
    if base is not None:
        _matrix("base", base, H, (*base.shape[:-1], D_out))
        rows = _rows(base)
        _shape("base", rows, (H.shape[0], D_out), "one row per row of H")
    H = H.to(accumulator(dtype)).contiguous()
    if _needs_graph(H, lora_B, base):
        y = autograd.Expand.apply(H, lora_B, rows, dtype)
    else:
        y = _ops.expand(H, autograd.rows_contiguous(lora_B.to(dtype)), None, None, rows, dtype)
    return y if base is None else y.view(base.shape)


def routed_lora_at_once(
    x,
    router_weight,
    lora_A,
    lora_B,
    top_k,
    rank_offsets,
    scaling,
    shared_a,
    base,
    gate,
    renormalize,
    bias,
    router_bias=None,
):
    """routed_lora of a decoding step in C++, or None where that is not what the call is.

    The operator checks what the public function checks, in a tenth of the time; a call that it refuses
    gets None too, for the public function to say what is wrong.  scaling: (E,) or a number;
    rank_offsets: an int, or the list of all.
    """
    try:
        if (
            torch.is_grad_enabled()
            or not x.is_cpu
            or backend.serving("cpu") != "cpp"
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or type(top_k) is not int
        ):
            return None
        shape = x.shape
        if type(scaling) in (float, int):
            scaling = _scaling(scaling, router_weight.shape[0], x)
        if type(rank_offsets) is int:
            rank_offsets = rank_offsets_of(rank_offsets, scaling.shape[0])
        if base is not None and base.shape[:-1] != shape[:-1]:
            return None
        if len(shape) != 2:
            x, base = x.view(-1, shape[-1]), None if base is None else base.view(-1, base.shape[-1])
        y, indices, weights, logits, mean_prob, lse, counts, _ = _ops.routed_lora.default(
            x, router_weight, lora_A, lora_B, base, bias, router_bias, scaling, rank_offsets,
            bool(shared_a), top_k, gate, bool(renormalize), math.inf, 0.0,
            plan.choose("cpp", 1, 0, 0, (), top_k, x.dtype),
        )  # fmt: skip
        if len(shape) != 2:
            y = y.view(*shape[:-1], y.shape[1])
        return y, Routing(indices, weights, counts, logits, mean_prob, lse)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None


def autocast_enabled(device_type: str) -> bool:
    """Some devices, meta among them, know no autocast and raise when asked."""
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


# --- checks: argument, expected, received --------------------------------------------------------


def _input(x, function, name="x"):
    """x itself, in autocast's dtype where autocast is on, as nn.Linear would take it."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")
    if x.dtype in _FLOATS and x.dtype != torch.float64 and autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: {function} takes float32, float64, bfloat16 or float16, got {x.dtype}"
        )
    if x.dim() < 1:
        raise ValueError(f"{name}: expected (..., D_in), got a scalar")
    return x


def _shape(name, tensor, expected, why=""):
    if tuple(tensor.shape) != tuple(expected):
        why = f", {why}" if why else ""
        raise ValueError(f"{name}: expected {tuple(expected)}{why}, got {tuple(tensor.shape)}")


def _device(name, tensor, x):
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {tensor.device}")


def _matrix(name, tensor, x, shape, why=""):
    """A dense floating tensor on x's device; None in `shape` leaves that size free."""
    if (  # the usual case in a third of the time: a decoding step makes a thousand of these checks
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.dtype in _FLOATS
        and tensor.device == x.device
        and _fits(tensor.shape, shape)
    ):
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: expected a dense floating tensor, got {tensor.dtype} {tensor.layout}"
        )
    if len(shape) != tensor.dim():
        raise ValueError(f"{name}: expected {len(shape)} dimensions, got {tuple(tensor.shape)}")
    expected = [
        have if want is None else want for want, have in zip(shape, tensor.shape, strict=True)
    ]
    _shape(name, tensor, expected, why)
    _device(name, tensor, x)


def _fits(have, shape):
    if len(have) != 2 or len(shape) != 2:
        return have == shape
    return shape[0] in (None, have[0]) and shape[1] in (None, have[1])


def _router(x, router_weight, top_k, gate, bias, router_bias):
    _matrix("router_weight", router_weight, x, (None, x.shape[-1]), "one column per feature of x")
    E = router_weight.shape[0]
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= E:
        raise ValueError(f"top_k: expected an integer in [1, {E}] for {E} experts, got {top_k!r}")
    if gate not in GATES:
        raise ValueError(f"gate: expected one of {GATES}, got {gate!r}")
    if bias is not None:
        _matrix("bias", bias, x, (E,), "one per expert")
    if router_bias is not None:
        _matrix("router_bias", router_bias, x, (E,), "one per expert")


def rank_offsets_of(rank_offsets, num_experts: int) -> list[int]:
    """E + 1 ascending row offsets from offsets or from one common rank; raises ValueError."""
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


def _experts(x, lora_A, lora_B, num_experts, rank_offsets, shared_a, frozen, scaling):
    offsets = rank_offsets_of(rank_offsets, num_experts)
    R = offsets[-1]
    if shared_a:
        r = offsets[1]
        if any(b - a != r for a, b in pairwise(offsets)):
            raise ValueError(f"rank_offsets: expected equal ranks with shared_a, got {offsets}")
        _matrix("lora_A", lora_A, x, (r, x.shape[-1]), "the shared rank's rows")
    else:
        _matrix("lora_A", lora_A, x, (R, x.shape[-1]), "one row per rank row of rank_offsets")
    _matrix("lora_B", lora_B, x, (R, None), "one row per rank row of rank_offsets")
    frozen = sorted(frozen)
    if any(type(e) is not int or not 0 <= e < num_experts for e in frozen):
        raise ValueError(f"frozen: expected expert ids in [0, {num_experts}), got {frozen}")
    return offsets, frozen, _scaling(scaling, num_experts, x)


def _scaling(scaling, num_experts, x):
    dtype = accumulator(x.dtype)
    if isinstance(scaling, torch.Tensor):
        _matrix("scaling", scaling, x, (num_experts,), "one per expert")
        if scaling.dtype == dtype and not scaling.requires_grad:
            return scaling
        return scaling.detach().to(dtype)
    if _is_finite(scaling):  # filled on the device: no copy from the host
        return torch.full((num_experts,), float(scaling), dtype=dtype, device=x.device)
    values = list(scaling) if isinstance(scaling, Sequence) else []
    if len(values) != num_experts or not all(_is_finite(v) for v in values):
        raise ValueError(
            f"scaling: expected a finite float or {num_experts} of them, got {scaling!r}"
        )
    if x.device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    # filled as well: a copy from the host would end the capture of a CUDA graph
    equal = [(float(v), len(list(same))) for v, same in groupby(values)]
    return torch.cat([torch.full((n,), v, dtype=dtype, device=x.device) for v, n in equal])


def _is_finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _base(base, x, lora_B):
    if base is None:
        return None
    _matrix("base", base, x, (*x.shape[:-1], lora_B.shape[1]), "x's leading dimensions and D_out")
    if base.dtype != x.dtype:
        raise TypeError(f"base: expected x's dtype {x.dtype}, got {base.dtype}")
    return _rows(base)


def _plan(x, lora_B, offsets, top_k, shared_a):
    serving, shape = backend.serving(x.device.type), (*x.shape, lora_B.shape[1])
    return plan.choose(serving, *shape, offsets, top_k, x.dtype, shared_a)


def _sparsity(top_p, threshold, gate):
    """As the operators take them: numbers that drop nothing where the caller gave none."""
    if top_p is not None and (not _is_finite(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if top_p is not None and gate != "softmax":
        raise ValueError(f"top_p: expected gate='softmax', whose gates sum to 1, got {gate!r}")
    if threshold is not None and (not _is_finite(threshold) or not 0 <= threshold <= 1):
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold!r}")
    return math.inf if top_p is None else float(top_p), float(threshold or 0)


def _selection(bias, x):
    return None if bias is None else bias.detach().to(accumulator(x.dtype)).contiguous()


def _rows(x):
    """(..., D) -> (T, D) with unit stride along D."""
    if x.dim() != 2:
        x = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return autograd.rows_contiguous(x)


def _like(x, y):
    """y (T, D_out) with x's leading dimensions."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _needs_graph(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _routing(indices, weights, logits, mean_prob, lse, counts):
    return Routing(indices, weights, counts, logits, mean_prob, lse)
