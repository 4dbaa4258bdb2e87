"""One row per launch: the GPU resources that its machine code uses."""

from __future__ import annotations

import re

from . import binary, ttir
from .loads import widths

WIDE = ("x", "dy", "A", "B")
# warps and blocks per SM, KB of shared memory per SM and per block
SM = {
    80: (64, 32, 164, 163), 86: (48, 16, 100, 99), 89: (48, 24, 100, 99), 90: (64, 32, 228, 227),
    100: (64, 32, 228, 227), 120: (48, 24, 100, 99),
}  # fmt: skip

NOTHING = {
    "config": "num_warps=0 num_stages=0", "registers": 0, "spills": 0, "shared_bytes": 0, "shared_limit": 0,
    "occupancy": 0, "limiter": "not compiled", "dots": 0, "dot_loops": 0, "tensor_core_loops": 0,
    "tensor_core_ops": 0, "fp32_fmas": 0, "float_atomics": 0, "load_bits": 0, "wide_loads": {}, "loads": {},
}  # fmt: skip


def row(launch, operands, target):
    """`operands` are the tensors of the call by name, used to identify arguments."""
    if isinstance(launch.kernel, Exception):
        return {"kernel": launch.name, "error": str(launch.kernel).splitlines()[-1]} | NOTHING
    kernel, code = launch.kernel, binary.instructions(launch.kernel)
    dot_loops, dots = ttir.loops_with_dots(kernel.asm["ttir"])
    loops = binary.loops(code)
    hot = [loop for loop in loops if binary.count(binary.TENSOR_CORE, loop)]
    in_loops = sum(binary.count(binary.TENSOR_CORE, loop) for loop in hot)
    loads = loads_by_operand(launch, operands)
    wide = {name: min(loads.get(name, {0})) for name in read(launch, operands) if name in WIDE}
    return {
        "kernel": launch.name,
        "config": configuration(launch.options, kernel.metadata),
        **(nvidia if target.backend == "cuda" else amd)(kernel, target, code),
        "dots": dots,
        "dot_loops": dot_loops,
        "tensor_core_loops": len(hot),
        "tensor_core_ops": in_loops if dot_loops else binary.count(binary.TENSOR_CORE, code),
        "fp32_fmas": sum(binary.count(binary.FP32_FMA, loop) for loop in loops),
        "float_atomics": ttir.float_atomics(kernel.asm["ttir"])
        + binary.count(binary.FLOAT_ATOMIC, code),
        "load_bits": min(wide.values(), default=max(set().union(*loads.values(), {0}))),
        "wide_loads": wide,
        "loads": {str(name): sorted(bits) for name, bits in loads.items()},
    }


def configuration(options, metadata):
    options = {
        k: v for k, v in options.items() if k not in ("enable_fp_fusion", "num_warps", "num_stages")
    }
    options |= {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages}
    return " ".join(f"{name}={value}" for name, value in options.items())


def read(launch, operands):
    """The operands, or names of other arguments, that the kernel loads from."""
    return {
        operand_of(launch, a.argument, operands)
        for a in ttir.accesses(launch.kernel.asm["ttir"])
        if a.reads
    }


def loads_by_operand(launch, operands):
    table = {}
    for argument, bits in widths(launch.kernel).items():
        table.setdefault(operand_of(launch, argument, operands), set()).update(bits)
    return table


def operand_of(launch, argument, operands):
    """The operand (x, dy, A, …) whose memory the argument is in, otherwise the argument."""
    value = launch.args.get(argument)
    if value is None:
        return argument
    storage = value.untyped_storage()._cdata
    return next((n for n, v in operands.items() if v.untyped_storage()._cdata == storage), argument)


# --- what a block uses of its multiprocessor --------------------------------------------------------


def nvidia(kernel, target, code):
    usage = binary.run_tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage")
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    warps, blocks, sm_kb, block_kb = SM[target.arch]
    mine, shared = kernel.metadata.num_warps, kernel.metadata.shared
    # a warp gets registers in units of 256, from its quarter of the SM; a block reserves 1 KB
    a_warp = -(-registers * 32 // 256) * 256
    most = {
        "registers": 4 * (16384 // a_warp) // mine,
        "shared memory": sm_kb * 1024 // (shared + 1024),
        "warps": warps // mine,
        "blocks": blocks,
    }
    if getattr(kernel.metadata, "tmem_size", 0):
        most["tensor memory"] = 512 // kernel.metadata.tmem_size
    return {
        "registers": registers,
        "spills": binary.count(re.compile("STL|LDL"), code),
        **occupancy(most, mine, warps, shared, block_kb),
    }


def amd(kernel, target, code):
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"]).group(1))

    registers, mine, shared = field("vgpr_count"), kernel.metadata.num_warps, kernel.metadata.shared
    most = {
        "registers": 4 * min(8, 512 // max(8, -(-registers // 8) * 8)) // mine,
        "shared memory": 64 * 1024 // max(1, shared),
        "warps": 32 // mine,
        "blocks": 16,
    }
    # scalar registers spilled into vector registers cost nothing; scratch memory does
    spills = field("vgpr_spill_count") + field("private_segment_fixed_size")
    return {"registers": registers, "spills": spills, **occupancy(most, mine, 32, shared, 64)}


def occupancy(most, mine, warps, shared, block_kb):
    limiter = min(most, key=most.get)
    return {
        "shared_bytes": shared,
        "shared_limit": block_kb * 1024,
        "occupancy": round(most[limiter] * mine / warps, 3),
        "limiter": limiter,
    }
