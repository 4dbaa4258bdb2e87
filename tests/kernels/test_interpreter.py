"""Assumptions of kernels and tests about Triton's interpreter; the sanitizer detects planted errors."""

from __future__ import annotations

import pytest
import torch

from ..support.interpreter import Sanitizer, interpreting

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU nothing is interpreted", allow_module_level=True)

with interpreting():
    from ..support.triton_kernels import samples


def test_bf16_dot_is_still_wrong_upstream():
    """If this fails, remove the INTERPRETED branches of triton_kernels/numerics.py."""
    a = torch.full((16, 16), 3.0, dtype=torch.bfloat16)
    out = torch.empty(16, 16)
    samples.dot[(1,)](a, out)
    assert not torch.equal(out, torch.full((16, 16), 144.0))


def test_casts_to_bf16_still_truncate_upstream():
    """If this fails, remove the same branches."""
    x = torch.full((16,), 1.0 + 2**-8 + 2**-12)
    out = torch.empty(16, dtype=torch.bfloat16)
    samples.copy[(1,)](x, out, 16, BLOCK=16)
    assert torch.equal(out, torch.ones(16, dtype=torch.bfloat16))


def test_our_rounding_to_bf16_is_torchs():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=g).to(torch.int32)
    x = bits.view(torch.float32)
    x[:8] = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]
    )
    out = torch.empty(4096, dtype=torch.bfloat16)
    samples.round_and_widen[(1,)](x, out, out2 := torch.empty(4096), BLOCK=4096)
    want = x.to(torch.bfloat16)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.nan_to_num(7), want.nan_to_num(7))
    assert torch.equal(out2.nan_to_num(7), want.float().nan_to_num(7))


def test_three_bf16_terms_hold_an_fp32():
    """The compiled router relies on this; the interpreter's truncating cast must be exact too."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, generator=g) * 10.0 ** torch.randint(-12, 12, (1024,), generator=g)
    samples.split_and_add[(1,)](x, out := torch.empty(1024), BLOCK=1024)
    assert torch.equal(out, x)
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    assert torch.equal(high + (middle + (x - high - middle).bfloat16().float()), x)


def test_sanitizer_passes_a_clean_kernel():
    x, out = torch.randn(100), torch.empty(100)
    with Sanitizer() as sanitizer:
        samples.copy[(4,)](x, out, 100, BLOCK=32)
    assert sanitizer.launches == 1
    assert torch.equal(x, out)


def test_sanitizer_finds_reads_past_the_end():
    x, out = torch.randn(64), torch.empty(64)
    with Sanitizer(), pytest.raises(Exception, match="outside of every argument"):
        samples.copy[(1,)](x[:20], out, 32, BLOCK=32)


def test_sanitizer_finds_reads_between_rows():
    x, out = torch.randn(4, 16), torch.empty(64)
    with Sanitizer(), pytest.raises(Exception, match="between the rows"):
        samples.copy[(1,)](x[:, :8], out, 32, BLOCK=32)


def test_sanitizer_finds_two_writers():
    x, out = torch.randn(32), torch.empty(32)
    with Sanitizer(), pytest.raises(Exception, match="two programs"):
        samples.copy_to_the_start[(2,)](x, out, BLOCK=16)


def test_sanitizer_finds_a_read_before_another_programs_write():
    x = torch.randn(32)
    with Sanitizer(), pytest.raises(Exception, match="another has read"):
        samples.shift[(2,)](x, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sanitizer_shows_what_a_masked_load_leaves_undefined(dtype):
    x, out = torch.ones(32, dtype=dtype), torch.zeros(32, dtype=dtype)
    samples.copy_without_other[(1,)](x, out, 20, BLOCK=32)
    assert not out.isnan().any(), "upstream returns zeros"
    with Sanitizer():
        samples.copy_without_other[(1,)](x, out, 20, BLOCK=32)
    assert torch.equal(out.isnan(), torch.arange(32) >= 20)


def test_sanitizer_makes_an_undefined_integer_large():
    x, out = torch.ones(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with Sanitizer():
        samples.copy_without_other[(1,)](x, out, 20, BLOCK=32)
    assert (out[20:] > 2**29).all()
    assert (out[:20] == 1).all()


def test_sanitizer_finds_int32_overflow():
    out = torch.empty(16)
    with Sanitizer(), pytest.raises(Exception, match="overflow"):
        samples.far_row[(1,)](out, 40000, 65536)
