"""Reads a compiled kernel's machine code: its loops and their instructions.

Both SASS and amdgcn are read into a list of instructions.  Branches give the control flow, and its
strongly connected components are the loops.  This finds the loops that run, wherever the compiler has
moved their blocks.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORE = re.compile(r"(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|QMMA|OMMA)\b|v_s?mfma")
FP32_FMA = re.compile(r"(?:FFMA2?\b|v_(?:fma|fmac|pk_fma|mad|mac)_f32)")
FLOAT_ATOMIC = re.compile(
    r"(?:RED|ATOM|ATOMG|ATOMS)\.\S*\.(?:F16|F32|F64|BF16)|(?:atomic|ds)_(?:pk_)?(?:add|min|max)_(?:rtn_)?(?:f|bf)"
)


class Instruction(NamedTuple):
    text: str
    labels: list[str]
    target: str | None  # of a branch
    goes_on: bool  # whether it may continue with the next instruction


def instructions(kernel):
    if "cubin" in kernel.asm:
        return list(sass(run_tool("nvdisasm", kernel.asm["cubin"], "-c")))
    return list(_amdgcn(kernel.asm["amdgcn"]))


def run_tool(name, cubin, *options):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass(text):
    labels = []
    for line in text.splitlines():
        if match := re.match(r"(\.L\S+):", line):
            labels.append(match.group(1))
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*(.*?)\s*;", line):
            predicate, text = match.groups()
            target = re.search(r"BRA.*`\((\.L\S+)\)", text)
            sometimes = predicate or re.search(r"BRA\S* !?U?P\d", text)
            ends = re.match(r"BRA|EXIT|RET|BRX", text) and not sometimes
            yield Instruction(text, labels, target and target.group(1), not ends)
            labels = []


def _amdgcn(text):
    labels = []
    for line in text[: text.index(".section\t.rodata")].splitlines():
        line = line.split(";")[0].strip()
        if match := re.match(r"(\.L\w+):", line):
            labels.append(match.group(1))
        elif match := re.match(r"([vsd]s?_\w+|(?:global|buffer|flat|scratch)_\w+)(.*)", line):
            op, rest = match.groups()
            target = rest.strip() if re.match(r"s_c?branch", op) else None
            yield Instruction(line, labels, target, op not in ("s_branch", "s_endpgm"))
            labels = []


def loops(code):
    """The instructions of every loop, without those of the loops inside it."""
    at = {label: n for n, i in enumerate(code) for label in i.labels}
    after = [
        [
            *([n + 1] if i.goes_on and n + 1 < len(code) else []),
            *([at[i.target]] if i.target in at else []),
        ]
        for n, i in enumerate(code)
    ]
    return [[code[n] for n in sorted(own)] for own in _loops(set(range(len(code))), after)]


def _loops(nodes, after):
    """Removing a loop's first instruction breaks it up, leaving only the loops inside it."""
    for loop in _strongly_connected(nodes, after):
        inner = list(_loops(loop - {min(loop)}, after))
        yield loop.difference(*inner)
        yield from inner


def _strongly_connected(nodes, after):
    """Tarjan's algorithm, without recursion; components of one node only if it follows itself."""
    index, low, on_stack, stack = {}, {}, set(), []
    for root in sorted(nodes):
        work = [(root, None)] if root not in index else []
        while work:
            node, successors = work.pop()
            if successors is None:
                index[node] = low[node] = len(index)
                stack.append(node)
                on_stack.add(node)
                successors = iter([n for n in after[node] if n in nodes])
            for n in successors:
                if n not in index:
                    work += [(node, successors), (n, None)]
                    break
                if n in on_stack:
                    low[node] = min(low[node], low[n])
            else:
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part = set()
                    while node not in part:
                        part.add(stack.pop())
                    on_stack -= part
                    if len(part) > 1 or node in after[node]:
                        yield part


def count(pattern, code):
    return sum(bool(pattern.match(i.text)) for i in code)
