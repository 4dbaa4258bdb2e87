"""LoraMoeConfig: accepted values survive a round trip, and refused values allocate no memory."""

import json
import tracemalloc

import pytest

from lora_moe import LoraMoeConfig


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


REFUSED = {
    "experts-zero": ("num_experts", 0),
    "experts-billion": ("num_experts", 10**9),
    "experts-bool": ("num_experts", True),
    "experts-float": ("num_experts", 8.0),
    "rank-zero": ("r", 0),
    "rank-negative": ("r", -4),
    "rank-huge": ("r", 2_000_000),
    "rank-bool": ("r", True),
    "rank-list-short": ("r", [4, 4]),
    "rank-list-bool": ("r", [4, 4, True, 4]),
    "rank-list-deep": ("r", nested(1000)),
    "rank-string": ("r", "8"),
    "top-k-zero": ("top_k", 0),
    "top-k-above-experts": ("top_k", 5),
    "top-k-bool": ("top_k", True),
    "alpha-nan": ("alpha", float("nan")),
    "alpha-inf": ("alpha", float("inf")),
    "alpha-huge": ("alpha", 1e38),
    "alpha-integer-beyond-floats": ("alpha", 10**400),
    "alpha-list": ("alpha", [1.0]),
    "alpha-bool": ("alpha", True),
    "alpha-negative": ("alpha", -1.0),
    "dropout-one": ("dropout", 1.0),
    "dropout-negative": ("dropout", -0.1),
    "dropout-nan": ("dropout", float("nan")),
    "gate": ("gate", "relu"),
    "gate-unhashable": ("gate", ["softmax"]),
    "renormalize": ("renormalize", 1),
    "shared-a": ("shared_a", "yes"),
    "selection-bias": ("selection_bias", None),
    "targets-number": ("target_modules", 3),
    "targets-empty-name": ("target_modules", ["q", ""]),
    "targets-of-lists": ("target_modules", [["q"]]),
    "targets-long-regex": ("target_modules", "a" * 5000),
    "balance-nan": ("balance_coef", float("nan")),
    "z-negative": ("z_coef", -1e-9),
}


@pytest.mark.parametrize("name, value", REFUSED.values(), ids=REFUSED)
def test_refused_values_are_named(name, value):
    tracemalloc.start()
    with pytest.raises(ValueError, match=name) as error:
        LoraMoeConfig.from_dict({"num_experts": 4, name: value})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "expected" in str(error.value) and "got" in str(error.value)
    assert len(str(error.value)) < 500  # the message truncates hostile values
    assert peak < 2 << 20


def test_refused_combinations():
    with pytest.raises(ValueError, match="equal ranks with shared_a"):
        LoraMoeConfig(num_experts=2, r=[4, 8], shared_a=True)
    with pytest.raises(ValueError, match="rows for all experts together"):
        LoraMoeConfig(num_experts=4096, r=1024)
    with pytest.raises(ValueError, match="one rank for each of 3 experts"):
        LoraMoeConfig(num_experts=3, r=[4, 8])


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="'rank'"):
        LoraMoeConfig.from_dict({"rank": 8})
    with pytest.raises(ValueError, match="a dict"):
        LoraMoeConfig.from_dict([("r", 8)])
    with pytest.raises(ValueError, match="fields"):
        LoraMoeConfig.from_dict({1: 2})


@pytest.mark.parametrize(
    "config",
    [
        LoraMoeConfig(),
        LoraMoeConfig(num_experts=3, r=[1, 17, 1024], top_k=3, alpha=5, target_modules=["q", "v"]),
        LoraMoeConfig(shared_a=True, gate="sigmoid", selection_bias=True, target_modules=r".*\.q"),
    ],
    ids=["defaults", "unequal-ranks", "regex"],
)
def test_round_trip_through_json(config):
    again = LoraMoeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


def test_ranks_and_offsets():
    assert LoraMoeConfig(num_experts=3, r=4).ranks == (4, 4, 4)
    assert LoraMoeConfig(num_experts=3, r=4).rank_offsets == 4
    unequal = LoraMoeConfig(num_experts=3, r=[1, 5, 2])
    assert unequal.ranks == (1, 5, 2) and unequal.rank_offsets == [0, 1, 6, 8]


def test_frozen():
    with pytest.raises(AttributeError):
        LoraMoeConfig().r = 4
