"""The routing that the recomputation of an activation checkpoint uses, in arrangements of real models."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lora_moe import LoraMoeConfig, disable_adapters, set_routing, use_routing

from ..support.models.llamas import gradients, with_experts

IDS = torch.tensor([0, 1, 2, 3, 0])


def blocks():
    """Three blocks of a linear with experts and a tanh."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
    return with_experts(net, LoraMoeConfig(num_experts=4, r=2, target_modules="all-linear")).train()


def sample():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def plainly(function, *args):
    return function(*args)


def checkpointed(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def nested(net, x, run):
    with use_routing(net, task_ids=IDS):
        return run(lambda x: net[2](run(net[1], run(net[0], x))), x)


def nested_twice(net, x, run):
    with use_routing(net, task_ids=IDS):
        return run(lambda x: run(lambda x: net[2](run(net[1], net[0](x))), x), x)


def two_blocks_in_one_checkpoint(net, x, run):
    def function(x):
        with use_routing(net, task_ids=IDS):
            y = net(x)
        with use_routing(net, task_ids=IDS.flip(0)):
            return 2 * y + net(x)

    return run(function, x)


def one_layer_with_and_without_experts(net, x, run):
    def function(x):
        with disable_adapters(net):
            y = net(x)
        return y - net(x)

    with use_routing(net, task_ids=IDS):
        return run(function, x)


def hooks_of_ones_own(net, x, run):
    def function(x):
        y = net[1](net[0](x))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return net[2](y)

    with use_routing(net, task_ids=IDS):
        return run(function, x)


ARRANGEMENTS = [
    nested,
    nested_twice,
    two_blocks_in_one_checkpoint,
    one_layer_with_and_without_experts,
    hooks_of_ones_own,
]


def gradients_of(arrangement, run, elsewhere=False, early_stop=True):
    """Gradients of two backward passes through one graph, after all use_routing blocks have ended."""
    net, x = blocks(), sample()
    with set_checkpoint_early_stop(early_stop):
        y = arrangement(net, x, run)

    def backward():
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()

    if elsewhere:
        worker = threading.Thread(target=backward)
        worker.start()
        worker.join()
    else:
        backward()
    return gradients(net) | {"x": x.grad}


@pytest.mark.parametrize("early_stop", [True, False], ids=["early-stop", "to-the-end"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "thread"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=lambda f: f.__name__)
def test_a_recompute_equals_its_forward(arrangement, elsewhere, early_stop):
    want = gradients_of(arrangement, plainly)
    got = gradients_of(arrangement, checkpointed, elsewhere, early_stop)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_hooks_on_saved_tensors_stay_as_they_were():
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    net, x = blocks(), sample()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        checkpointed(net, x).sum().backward()
        before = len(packed)
        x.sin()
        assert len(packed) == before + 1
    x.sin()
    assert len(packed) == before + 1


class ShyCheckpoint(torch.autograd.Function):
    """A reentrant checkpoint that stores its context under a different name."""

    @staticmethod
    def forward(kept, function, x):
        kept.function, kept.x = function, x.detach().requires_grad_()
        return function(x)

    @staticmethod
    def backward(kept, dy):
        with torch.enable_grad():
            kept.function(kept.x).backward(dy)
        return None, kept.x.grad


@pytest.mark.parametrize("decide", ["use_routing", "set_routing"])
def test_a_recompute_that_cannot_know_raises_where_its_forward_was_told_otherwise(decide):
    net, x = blocks(), sample()
    if decide == "use_routing":
        with use_routing(net, task_ids=IDS):
            y = ShyCheckpoint.apply(net, x)
    else:
        set_routing(net, task_ids=IDS)
        y = ShyCheckpoint.apply(net, x)
        set_routing(net)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


def test_a_reentrant_recompute_in_another_block_with_the_same_ids_is_fine():
    net, x = blocks(), sample()
    with use_routing(net, task_ids=IDS):
        net(x).sum().backward()
    want = gradients(net)
    net.zero_grad()
    with use_routing(net, task_ids=IDS):
        y = checkpoint(net, x, use_reentrant=True)
    with use_routing(net, task_ids=IDS):
        y.sum().backward()
    got = gradients(net)
    assert all(torch.equal(got[name], want[name]) for name in want)
