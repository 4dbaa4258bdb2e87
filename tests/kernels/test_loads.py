"""The source of a compiled kernel's loads, as printed by the Triton versions that torch ships with."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from benchmarks.static import loads

LOAD = "\tld.global.v4.b32 \t{ %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];"
FILES = '\t.file\t1 "/x/shrink.py"\n\t.file\t2 "/x/numerics.py"\n'
CALLED = (("numerics.py", 193, 20), ("shrink.py", 51, 70))
WORDS = {
    "3.6: the call in a comment": "\t.loc\t2 193 20        // numerics.py:193:20 @[ shrink.py:51:70 ]",
    "3.9: the call in the directive": "\t.loc\t2 193 20, function_name $L__info_string0, inlined_at 1 51 70",
}


@pytest.mark.parametrize("line", WORDS.values(), ids=list(WORDS))
def test_a_load_of_an_inlined_function(line):
    assert list(loads._ptx(f"{FILES}{line}\n{LOAD}\n")) == [(128, CALLED)]


@pytest.mark.parametrize("comment", ["", "                         // shrink.py:60:9"])
def test_a_load_of_the_kernel_itself(comment):
    found = list(loads._ptx(f"{FILES}\t.loc\t1 60 9{comment}\n{LOAD}\n"))
    assert found == [(128, (("shrink.py", 60, 9),))]


def test_a_load_in_amd_code():
    text = "\t.loc\t2 193 20 is_stmt 0 ; /x/numerics.py:193:20 @[ /x/shrink.py:51:70 ]\n"
    text += "\tglobal_load_dwordx4 v[0:3], v[4:5], off\n"
    assert list(loads._amdgcn(text)) == [(128, CALLED)]
