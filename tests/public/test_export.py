"""Export, CUDA graphs and full graphs: no operator reads a value on the host or mutates its inputs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_moe import Routing, plan, reference
from lora_moe import functional as F
from lora_moe.ops import SCHEMAS

from ..support.cases import BY_NAME, leaves, sample
from ..support.functions import BACKEND, FUNCTIONS, USED, experts_of, inputs_of, routed

CASE = BY_NAME["unequal ranks"]
# a GPU kernel's plan, and so an exported graph, covers one class of token counts
LARGEST = plan.DECODE_T if BACKEND == "triton" else 4096


class Routed(nn.Module):
    """Calls every public function once."""

    def __init__(self, options):
        super().__init__()
        v = sample(CASE)
        for name in ("router_weight", "lora_A", "lora_B", "router_bias", "bias"):
            self.register_buffer(name, v[name])
        self.options = options

    def forward(self, x):
        y, routing = F.routed_lora(
            x, self.router_weight, self.lora_A, self.lora_B, CASE.K, bias=self.bias,
            router_bias=self.router_bias, **experts_of(CASE), **self.options,
        )  # fmt: skip
        again = Routing.from_logits(routing.logits, CASE.K, **self.options)
        z = F.grouped_lora(x, self.lora_A, self.lora_B, again, base=y, **experts_of(CASE))
        s, _ = F.shrink(x, self.lora_A)
        router = F.router_topk(x, self.router_weight, CASE.K, **self.options)
        return F.expand(s, self.lora_B, z), router.weights


def exported(options):
    module = Routed(options).eval()
    tokens = torch.export.Dim("tokens", min=1, max=LARGEST)
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(9, CASE.D_in),), dynamic_shapes=({0: tokens},)
        )
    return module, program


@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}, {"top_p": 0.7}], ids=str)
def test_export_with_any_number_of_tokens(options, tmp_path):
    module, program = exported(options)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for tokens in (1, 2, 9, LARGEST):
        x = torch.randn(tokens, CASE.D_in)
        with torch.no_grad():
            for got, want in zip(loaded(x), module(x), strict=True):
                assert torch.equal(got, want)


def test_an_exported_graph_is_json():
    """AOTInductor writes operator arguments as JSON, which has no infinity."""
    _, program = exported({})
    calls = [n for n in program.graph.nodes if str(n.target).startswith("lora_moe.")]
    assert {str(n.target).split(".")[1] for n in calls} >= {
        *("routed_lora", "route_logits", "grouped_lora", "shrink", "expand", "router_topk")
    }
    for node in calls:
        plain = [a for a in node.args if isinstance(a, (int, float, str, list, tuple))]
        numbers = [a for a in plain if isinstance(a, float)]
        assert all(map(math.isfinite, numbers)), node
        json.dumps([a for a in plain if not isinstance(a, (list, tuple))], allow_nan=False)


def test_graphs_saved_with_an_infinite_top_p_still_run():
    x, w = torch.randn(5, 6), torch.randn(4, 6)
    options = None, None, 2, "softmax", True
    old = torch.ops.lora_moe.router_topk(x, w, *options, math.inf, 0.0)
    new = torch.ops.lora_moe.router_topk(x, w, *options, reference.ALL_KEPT, 0.0)
    assert all(map(torch.equal, old, new))


class Seen(TorchDispatchMode):
    """Records the operators of a call with the devices of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        devices = {t.device.type for t in tensors if isinstance(t, torch.Tensor) and t.dim()}
        self.calls.append((func, devices))
        return result


def test_a_forward_on_cuda_tensors_reads_no_value_and_changes_no_operand():
    v = sample(CASE)
    with FakeTensorMode(), torch.no_grad(), Seen() as seen:
        v = {
            k: t if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for k, t in v.items()
        }
        y, routing = routed(v, CASE)
        again = Routing.from_logits(routing.logits, CASE.K)
        F.grouped_lora(v["x"], v["lora_A"], v["lora_B"], again, base=y, **experts_of(CASE))
    assert y.device.type == "cuda"
    ours = [func for func, _ in seen.calls if func.namespace == "lora_moe"]
    assert len(ours) == 3
    for func, devices in seen.calls:
        assert devices <= {"cuda"}, f"{func} crosses devices: {devices}"
        assert "_local_scalar_dense" not in str(func) and not func._schema.is_mutable, func


def test_no_operator_mutates_or_has_shapes_that_depend_on_values():
    unsafe = {
        getattr(torch.Tag, name)
        for name in ("cudagraph_unsafe", "dynamic_output_shape", "data_dependent_output")
        if hasattr(torch.Tag, name)
    }
    for name in SCHEMAS:
        operator = getattr(torch.ops.lora_moe, name).default
        assert not operator._schema.is_mutable, name
        assert all(r.alias_info is None for r in operator._schema.returns), name
        assert not unsafe & set(operator.tags), name


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"threshold": 0.1}], ids=str)
def test_two_layers_compile_with_dynamic_sizes(options):
    """A named float becomes a symbol with dynamic=True; PyTorch loses track of it between two Functions."""
    torch._dynamo.reset()
    v = leaves(sample(BY_NAME["odd"]), "x", "lora_A")

    def step(v):
        x = v["x"]
        for _ in range(2):
            y, routing = routed({**v, "x": x}, BY_NAME["odd"], **options)
            x = x + y[:, : x.shape[1]]
        return x.square().sum() + routing.lse.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(v), [v["x"], v["lora_A"]]) for f in (compiled, step))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_forward_and_backward_compile_to_one_graph_each_and_read_no_value():
    """The loss uses all outputs of all functions; a new number of tokens does not recompile."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)

    ids = torch.randint(-1, CASE.E, (33, CASE.K), generator=torch.Generator().manual_seed(0))

    def step(v):
        y, r = routed(v, CASE)
        r2 = F.router_topk(v["x"], v["router_weight"], CASE.K, router_bias=v["router_bias"])
        r3 = Routing.from_logits(v["logits"], CASE.K, gate="sigmoid")
        given = Routing.from_ids(ids[: len(v["x"])], v["weights"], num_experts=CASE.E)
        z = F.grouped_lora(v["x"], v["lora_A"], v["lora_B"], given, base=y, **experts_of(CASE))
        s, logits = F.shrink(v["x"], v["lora_A"], v["router_weight"])
        z = F.expand(s, v["lora_B"], z)
        of_routings = [(t.weights, t.logits, t.mean_prob, t.lse) for t in (r, r2, r3)]
        return sum(t.square().sum() for t in (z, logits, *(t for ts in of_routings for t in ts)))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    names = sorted({n for f in FUNCTIONS for n in USED[f]} - {"H"})
    for tokens in (31, 20, 27):  # not 33: it equals D_out, and the two sizes would share one symbol
        v = inputs_of(CASE, torch.float32)
        v = {k: t[:tokens] if k in ("x", "base", "weights", "logits") else t for k, t in v.items()}
        v = leaves(v, *names)
        got = torch.autograd.grad(compiled(v), [v[n] for n in names])
        want = torch.autograd.grad(step(v), [v[n] for n in names])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
    for graph in graphs:
        targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        assert any(t.startswith("lora_moe.") for t in targets)
        assert not [t for t in targets if "_local_scalar_dense" in t or "nonzero" in t]
