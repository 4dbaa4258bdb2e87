"""The launches and bytes that experts add to a layer, counted from real launches, stay within bounds."""

from __future__ import annotations

import json

import pytest

from ..support.compiled import run_compiled

pytest.importorskip("triton")

# (launches, MB of memory, MB from L2) at T = 8192, 4096 x 4096, K = 2, bf16
GOALS = {
    "E=8, forward": (3, 230, 360),
    "E=8, backward": (5, 410, 750),
    "E=64, forward": (9, 320, 1250),
    "E=64, backward": (14, 610, 1300),
}
OF_SLOTS = {  # grouped_lora with one row per slot
    "apart": ((6, 285, 450), (14, 440, 720)),
    "sum": ((12, 285, 450), (8, 440, 720)),
}


@pytest.fixture(scope="module")
def counted():
    found = {}
    for E in (8, 64):
        sides = json.loads(run_compiled("benchmarks.accounting", "--json", "--E", str(E)))
        found |= {f"E={E}, {side}": launches for side, launches in sides.items()}
    return found


@pytest.mark.parametrize("side", GOALS)
def test_accounting(counted, side):
    check(counted[side], *GOALS[side])


@pytest.mark.nightly
@pytest.mark.parametrize("slots", OF_SLOTS)
def test_accounting_of_slots(slots):
    """No row is copied per slot: x, base, y and their gradients account for almost all traffic."""
    sides = json.loads(run_compiled("benchmarks.accounting", "--json", "--slots", slots))
    for launches, most in zip(sides.values(), OF_SLOTS[slots], strict=True):
        check(launches, *most)


def check(launches, most_launches, most_mb, most_l2):
    assert sum(n for *_, n in launches) <= most_launches, launches
    assert sum(read + written for _, read, written, *_ in launches) <= most_mb * 1e6, launches
    assert sum(l2 for _, _, _, l2, *_ in launches) <= most_l2 * 1e6, launches


def test_nothing_is_left_out(counted):
    """Forward reads x and the base and writes y; backward reads dy and x twice and writes dx."""
    activation = 8192 * 4096 * 2
    assert sum(read for _, read, *_ in counted["E=8, forward"]) > 2 * activation
    assert sum(written for _, _, written, *_ in counted["E=8, forward"]) > activation
    assert sum(read for _, read, *_ in counted["E=8, backward"]) > 2 * activation
    assert sum(written for _, _, written, *_ in counted["E=8, backward"]) > activation


def test_models_agree_with_published_counts():
    """Published figures and earlier measurements at the same shape, in launches and MB."""
    from benchmarks.static import schemes

    s = schemes.Shape(8192, 4096, 8, 16, 2)
    for name, launches, mb in [
        ("minimum", 1, 73),
        ("loop over experts, eager", 106, 1814),
        ("ScatterMoE, composed", 9, 741),
        ("vLLM fused_moe_lora", 12, 1212),
        ("MeteoRA", 7, 1009),
    ]:
        steps = schemes.SCHEMES[name][0](s)
        assert schemes.total(steps)[0] == launches
        assert schemes.total(steps)[1] / 1e6 == pytest.approx(mb, rel=0.02)
    assert schemes.meteora_in_l2(s) / 1e9 == pytest.approx(75, rel=0.01)
    assert schemes.total(schemes.eager(s._replace(E=64)))[0] == 778
