"""Width of the global loads of a compiled kernel, by operand.

PTX and amdgcn carry the source line of every instruction and of the call where it was inlined; TTIR has
the same for every load, and also which argument it reads.
"""

from __future__ import annotations

import re

from .ttir import accesses

LOC = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?")
ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+|\d+)[,;]")
LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")
AMD = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "ubyte": 8}


def widths(kernel):
    """Bits that a thread loads at once, by argument; None stands for loads that could not be attributed."""
    asm = kernel.asm
    found = _ptx(asm["ptx"]) if "ptx" in asm else _amdgcn(asm["amdgcn"])
    arguments = {a.where[:2]: a.argument for a in accesses(asm["ttir"]) if a.reads}
    table = {}
    for bits, where in found:
        table.setdefault(arguments.get(where), set()).add(bits)
    return table


def _ptx(text):
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text))
    where, inline = (), False
    for line in text.splitlines():
        if "inline asm" in line:  # inside inline assembly, LLVM continues the source's line numbers
            inline = "begin" in line
        elif match := LOC.match(line):
            frames = match.groups()[:3], match.groups()[3:]
            if not inline:
                where = tuple((files[f], int(n), int(c)) for f, n, c in frames if f)
                if len(where) == 1:  # Triton before 3.7 gives the call only in a comment
                    where = _commented(line) or where
        elif match := ASYNC.search(line):
            yield 8 * int(match.group(1), 0), where
        elif match := LOAD.search(line):
            yield int(match.group(1) or 1) * int(match.group(2)), where
        elif "cp.async.bulk.tensor" in line:
            yield 128, where


def _amdgcn(text):
    where = ()
    for line in text.splitlines():
        if re.match(r"\s*\.loc\s", line):
            where = _commented(line)
        elif match := re.match(
            r"\s*(?:global|buffer|flat)_load_(?:lds_)?([a-z]+?(?:x\d)?)\b", line
        ):
            yield AMD.get(match.group(1), 16), where


def _commented(line):
    """The two innermost frames of a comment like  numerics.py:193:20 @[ shrink.py:51:70 ]."""
    frames = re.findall(r"(\S+\.py):(\d+):(\d+)", re.split(r";|//", line, maxsplit=1)[-1])
    return tuple((f.split("/")[-1], int(n), int(c)) for f, n, c in frames[:2])
