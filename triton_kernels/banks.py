"""Several layers that read the same x, such as q, k, v or gate, up of a fused linear; for inference.

    y[:, columns of bank i] = base + routed_lora of bank i

If their operands are contiguous in memory, the decode plan runs all banks in the two launches of a
single one; otherwise, and in all other plans, the banks run one after another.

Letters: T tokens, E experts of a bank, R its rank rows.
"""

from itertools import accumulate

import torch

from .decode import decode_banks
from .experts import bundle_experts
from .lora_forward import routed_lora
from .operands import require_supported, rows_contiguous
from .router_topk import MAX_EXPERTS, biases_of, gate_options


def routed_lora_banks(
    x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, starts, top_k, gate, renormalize,
    top_p, threshold, plan,
):  # fmt: skip
    """y (T, D_out)."""
    require_supported(x, *w, *a, *b)
    widths = [m.shape[1] for m in b]
    columns = [(start, start + width) for start, width in zip(starts, widths, strict=True)]
    router = top_k, gate, renormalize, top_p, threshold
    gaps = sum(widths) < base.shape[1]
    operands = side_by_side(w), side_by_side(a), side_by_side(b, 1), side_by_side(scaling)
    biases = side_by_side(bias), side_by_side(router_bias)
    apart = any(v is None for v in operands) or any(
        v is None and given[0] is not None for v, given in zip(biases, (bias, router_bias))
    )
    y = base.clone(memory_format=torch.contiguous_format) if gaps else x.new_empty(base.shape)
    if plan == "decode" and not apart and len(x) and len(scaling[0]) <= MAX_EXPERTS:
        in_b = [0, *accumulate(widths)]
        columns = [(*place, first) for place, first in zip(columns, in_b)]
        w, a, b, scaling = operands
        experts = bundle_experts(a, b, scaling, offsets, shared_a)
        options = gate_options(*router)
        x, w, base = rows_contiguous(x), rows_contiguous(w), rows_contiguous(base)
        decode_banks(x, w, biases_of(*biases), base, experts, columns, options, y)
        return y
    for i, (begin, end) in enumerate(columns):
        y[:, begin:end] = routed_lora(
            x, w[i], a[i], b[i], base[:, begin:end], bias[i], router_bias[i], scaling[i], offsets, shared_a,
            *router, plan,
        )[0]  # fmt: skip
    return y


def side_by_side(tensors, dim=0):
    """The tensors as one, without a copy, if they are contiguous along dim; else None."""
    first = tensors[0]
    if any(t is None for t in tensors):
        return None
    place, total = first.storage_offset(), 0
    for t in tensors:
        alike = t.dtype == first.dtype and t.stride() == first.stride()
        if (
            not alike
            or t.storage_offset() != place
            or t.untyped_storage().data_ptr() != _memory(first)
        ):
            return None
        place += t.shape[dim] * t.stride(dim)
        total += t.shape[dim]
    size = list(first.shape)
    size[dim] = total
    return first.as_strided(size, first.stride(), first.storage_offset())


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()
