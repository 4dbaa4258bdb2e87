"""Time of a training step of the whole encoder, with experts in all linears."""

import functools

import torch
from torch.nn.functional import cross_entropy

from benchmarks import timing
from examples.branch_lora import arms
from examples.branch_lora.learners import scores
from examples.common.training import optimizer_of


def step_times(data, rounds, size):
    """{arm: seconds per training step}, interleaved, on the same texts; `after`: all tasks but the last."""
    texts = next(data.tasks[0].batches(1, size, 0))
    tokens, wanted = data.tokens(texts), data.wanted(texts)

    def loss_of(model):
        hidden = model(**tokens).last_hidden_state
        return cross_entropy(scores(hidden, tokens["attention_mask"], data.targets), wanted)

    def step(model, optimizer):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    steps = {}
    before = {"lora": 0, "moelora": 0, "BranchLoRA": 0, "BranchLoRA, after": len(data.tasks) - 1}
    for name, tasks in before.items():
        torch.manual_seed(0)
        learner = arms.make(name.partition(",")[0], data.targets, len(data.tasks), whole=True)
        for _ in range(tasks):
            learner.begin([])
            loss_of(learner.model)  # gives some branches usage
            learner.end([])
        learner.begin([])
        steps[name] = functools.partial(step, learner.model, optimizer_of(learner.model, 1e-3))
    return timing.interleave(steps, rounds, timing.once)
