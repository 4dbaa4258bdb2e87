"""Sharded serving without a server: the ranks' shards together equal the whole layer.

Shapes, shards and operators are those that vLLM uses; tests/stack/vllm runs them in vLLM itself.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, LoraMoeLinear
from lora_moe.routers import NoisyRouter, ThresholdRouter
from lora_moe.vllm import ops, rules
from lora_moe.vllm.bank import Banks, Projection
from lora_moe.vllm.shards import Shard

D_IN, T = 24, 13
SIZES = {"num_experts": 4, "r": 3, "alpha": 4}
CONFIGS = {
    "softmax": LoraMoeConfig(**SIZES),
    "sigmoid": LoraMoeConfig(**SIZES, gate="sigmoid", renormalize=False, temperature=0.7),
    "unequal-ranks": LoraMoeConfig(num_experts=3, r=[1, 6, 2], alpha=[5, 3, 1], use_rslora=True),
    "shared-a": LoraMoeConfig(**SIZES, shared_a=True),
    "dense": LoraMoeConfig(**SIZES, top_k=4),
    "selection-bias": LoraMoeConfig(**SIZES, selection_bias=True, router_bias=True),
    "top-p": LoraMoeConfig(**SIZES, top_k=3, top_p=0.6),
    "threshold": LoraMoeConfig(**SIZES, top_k=3, threshold=0.3, router_bias=True, temperature=2.0),
    "noisy": LoraMoeConfig(**SIZES, router=NoisyRouter(std=1.0)),
    "learned-threshold": LoraMoeConfig(**SIZES, router=ThresholdRouter(max_threshold=0.4)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def experts(config, D_out, seed=0):
    """A layer whose experts, routers and biases all affect the output."""
    torch.manual_seed(seed)
    layer = LoraMoeLinear(nn.Linear(D_IN, D_out), config).eval()
    with torch.no_grad():
        for name, tensor in layer.adapter_state().items():
            if name != "lora_A":
                tensor.normal_(std=0.5)
    return layer


def projection(layer, index=0):
    return Projection(index, layer.config, layer.adapter_state())


def banks_on(shard, projections, dtype=torch.float32):
    holder = nn.Module()
    return holder, Banks(holder, shard, projections, dtype, torch.device("cpu"))


def served(shards, projections, x, bases, dtype=torch.float32):
    """Every rank's output; logits are summed over the ranks as an all-reduce does."""
    ranks = [banks_on(shard, projections, dtype) for shard in shards]
    inputs = [x[:, slice(*shard.rows())].contiguous() for shard in shards]
    seen = []
    calls = list(zip(ranks, inputs, bases, strict=True))
    with torch.inference_mode():
        if shards[0].sums_logits:
            for (holder, banks), x_p, y_p in calls:
                banks.add(holder, x_p, y_p, lambda logits: seen.append(logits) or logits)
        total = sum(seen)
        return [banks.add(holder, x_p, y_p, lambda _: total) for (holder, banks), x_p, y_p in calls]


def shards_of(kind, ranks, widths, replicas=()):
    return [Shard(kind, rank, ranks, D_IN, widths, replicas) for rank in range(ranks)]


@torch.inference_mode()
def whole(layer, x, y):
    return layer.adapt(x, y)


@every_config
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_columns_side_by_side_are_the_whole_layer(config, ranks):
    layer = experts(config, 8)
    x, y = torch.randn(T, D_IN), torch.randn(T, 8)
    parts = served(
        shards_of("column", ranks, (8 // ranks,)), [projection(layer)], x, y.chunk(ranks, 1)
    )
    torch.testing.assert_close(torch.cat(parts, 1), whole(layer, x, y), rtol=1e-5, atol=1e-5)


@every_config
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_sum_to_the_whole_layer(config, ranks):
    layer = experts(config, 10)
    x, y = torch.randn(T, D_IN), torch.randn(T, 10)
    bases = [y / ranks] * ranks
    parts = served(shards_of("row", ranks, (10,)), [projection(layer)], x, bases)
    torch.testing.assert_close(sum(parts), whole(layer, x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_replicated_layer_is_whole_on_every_rank(ranks):
    layer = experts(CONFIGS["softmax"], 6)
    x, y = torch.randn(T, D_IN), torch.randn(T, 6)
    for part in served(shards_of("replicated", ranks, (6,)), [projection(layer)], x, [y] * ranks):
        torch.testing.assert_close(part, whole(layer, x, y))


# 8 query heads of 2 columns, 2 key and value heads: with 4 ranks, pairs of ranks hold the same head
QKV = {1: ((16, 4, 4), ()), 2: ((8, 2, 2), ()), 4: ((4, 2, 2), (1, 2, 2))}


@pytest.mark.parametrize("ranks", QKV)
@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,)], ids=["q-k-v", "q-v", "k"])
def test_key_and_value_heads_that_ranks_share(ranks, present):
    widths, replicas = QKV[ranks]
    names = ["softmax", "unequal-ranks", "learned-threshold"]
    layers = [experts(CONFIGS[n], w, i) for i, (n, w) in enumerate(zip(names, (16, 4, 4)))]
    x, ys = torch.randn(T, D_IN), [torch.randn(T, w) for w in (16, 4, 4)]
    expected = [whole(layers[i], x, y) if i in present else y for i, y in enumerate(ys)]
    shards = shards_of("column", ranks, widths, replicas)
    assert shards[0].wholes == (16, 4, 4)

    def held(rank, whole_outputs):
        """The rank's part of the outputs, by heads: key head h is on ranks h * replicas and following."""
        every = replicas or (1, 1, 1)
        return [
            v[:, rank // n * w : (rank // n + 1) * w]
            for v, w, n in zip(whole_outputs, widths, every)
        ]

    bases = [torch.cat(held(rank, ys), 1) for rank in range(ranks)]
    parts = served(shards, [projection(layers[i], i) for i in present], x, bases)
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part, torch.cat(held(rank, expected), 1), rtol=1e-5, atol=1e-5)


def test_one_bank_over_all_outputs_of_a_fused_layer():
    """A base whose checkpoint has qkv_proj as one linear."""
    layer = experts(CONFIGS["softmax"], 24)
    x, y = torch.randn(T, D_IN), torch.randn(T, 24)
    shards = shards_of("column", 4, *QKV[4])
    columns = [[c for span in s.columns(None) for c in range(*span)] for s in shards]
    assert columns[1] == [4, 5, 6, 7, 16, 17, 20, 21] and columns[3][4:] == [18, 19, 22, 23]
    parts = served(shards, [projection(layer, None)], x, [y[:, c] for c in columns])
    for part, own in zip(parts, columns):
        torch.testing.assert_close(part, whole(layer, x, y)[:, own], rtol=1e-5, atol=1e-5)


def test_bf16_experts_beside_a_router_in_fp32():
    layer = experts(CONFIGS["selection-bias"], 8)
    x, y = torch.randn(T, D_IN).bfloat16(), torch.randn(T, 8).bfloat16()
    for kind in ("column", "row"):
        shard = Shard(kind, 0, 1, D_IN, (8,))
        holder, _ = banks_on(shard, [projection(layer)], torch.bfloat16)
        assert holder.lora_moe_0_w.dtype == torch.float32 == holder.lora_moe_0_scaling.dtype
        assert holder.lora_moe_0_a.dtype == holder.lora_moe_0_b.dtype == torch.bfloat16
        assert not holder.state_dict() and not list(holder.parameters())
        (part,) = served([shard], [projection(layer)], x, [y], torch.bfloat16)
        torch.testing.assert_close(part, whole(layer, x, y), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_compiled_layer_takes_any_number_of_tokens(kind):
    layer = experts(CONFIGS["top-p"], 8)
    ranks = 1 if kind == "column" else 2
    shard = Shard(kind, 0, ranks, D_IN, (4, 4) if kind == "column" else (8,))
    fit = projection(experts(CONFIGS["softmax"], 4), 1) if kind == "column" else projection(layer)
    holder, banks = banks_on(shard, [fit])
    holder.forward = lambda x, y: banks.add(holder, x * 2, y, lambda logits: 3 * logits) + 1
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    compiled = torch.compile(holder.forward, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for tokens in (5, 64, 9, 3):
            x, y = torch.randn(tokens, D_IN // ranks), torch.randn(tokens, 8)
            torch.testing.assert_close(compiled(x, y), holder.forward(x, y), rtol=0, atol=0)
    assert len(graphs) == 1
    names = {str(node.target) for node in graphs[0].graph.nodes}
    own = {n for n in names if n.startswith(ops.NAMESPACE)}
    assert len(own) == (1 if kind == "column" else 2) and not any(
        n.startswith("lora_moe.") for n in names
    )


def test_operators_keep_their_contract():
    holder, banks = banks_on(
        Shard("column", 0, 1, D_IN, (8,)), [projection(experts(CONFIGS["top-p"], 8))]
    )
    x, y = torch.randn(T, D_IN), torch.randn(T, 8)
    w, a, *rest = banks._tensors(holder, 0)
    lists = [[t] for t in rest]
    own = torch.ops.lora_moe_serving
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        own.add_experts.default, (x, y, [w], [a], *lists, banks.rules), test_utils=tests
    )
    torch.library.opcheck(own.shrink.default, (x, w, a), test_utils=tests)
    s, logits = own.shrink(x, w, a)
    torch.library.opcheck(
        own.add_gated.default, (s, logits, y, *rest, banks.rules), test_utils=tests
    )


@every_config
def test_rules_survive_as_text(config):
    rule = rules.rule_of(config, 3, 11)
    assert rules.from_text(rules.to_text((rule, rule))) == (rule, rule)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "diagonal"}, "kind"),
        ({"rank": 2}, "rank"),
        ({"replicas": (3,)}, "replicas"),
        ({"kind": "row", "D_in": 23}, "row"),
    ],
)
def test_shards_that_make_no_sense(fields, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        Shard(**{"kind": "column", "rank": 0, "ranks": 2, "D_in": 24, "widths": (4,)} | fields)


def test_a_cut_of_another_layer_is_refused():
    layer = experts(CONFIGS["softmax"], 8)
    with pytest.raises(ValueError, match="lora_B: expected 12 columns, got 8"):
        banks_on(Shard("column", 0, 2, D_IN, (6,)), [projection(layer)])
