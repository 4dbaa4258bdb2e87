"""Does MMoLRE do what its paper claims?  Sentiment and emotion from words and drawn kaomoji.

    python -m examples.mmolre --out build/mmolre

Arms of one model, trained from the same batches and seeds: shared and task-specific low-rank experts
against hard parameter sharing, full-rank experts, no task-specific experts, one modality, one task.
The protocol, with what is compared and how, is in docs/mmolre.md; the data in examples/mmolre/data.py.
"""

import dataclasses
import time
from functools import partial

import torch
from torch import nn

from benchmarks import timing
from examples.common import evidence
from examples.mmolre import data as mmolre_data
from examples.mmolre import report
from lora_moe.methods import mmolre
from lora_moe.methods.mmolre import MMoLRE, MMoLREConfig, Task, UniTSE
from lora_moe.methods.mmolre.affect import multilabel_metrics, sentiment_metrics

WIDTH, RANK, SHARED = 128, 8, 4
STEPS, BATCH, RATE, WEIGHT_DECAY = 400, 64, 2e-3, 0.01
WATCHED = 20  # steps from one look at the gradients to the next
MOST_HELD_OUT = 1000

TASKS = {"sentiment": Task("mae"), "emotion": Task("multilabel", len(mmolre_data.EMOTIONS))}
FEATURES = {"text": mmolre_data.TEXT, "image": mmolre_data.IMAGE}
OURS = MMoLREConfig(
    modalities=FEATURES,
    tasks=TASKS,
    width=WIDTH,
    shared_ranks=(RANK,) * SHARED,
    task_rank=RANK,
)


def with_rank(rank):
    """OURS with another rank of all experts."""
    return dataclasses.replace(OURS, shared_ranks=(rank,) * SHARED, task_rank=rank)


def hard_sharing(rank):
    """As many rank rows, all of them in one stream that every task reads."""
    ranks = {"shared_ranks": (rank,) * (SHARED + len(TASKS)), "task_rank": 0}
    return dataclasses.replace(OURS, hard_sharing=True, **ranks)


ARMS = {
    "MMoLRE": OURS,
    "hard sharing": hard_sharing(RANK),
    "no task experts": dataclasses.replace(hard_sharing(RANK), hard_sharing=False),
    "full-rank experts": with_rank(WIDTH),
    "text alone": dataclasses.replace(OURS, modalities={"text": FEATURES["text"]}),
    "image alone": dataclasses.replace(OURS, modalities={"image": FEATURES["image"]}),
    "sentiment alone": dataclasses.replace(OURS, tasks={"sentiment": TASKS["sentiment"]}),
    "emotion alone": dataclasses.replace(OURS, tasks={"emotion": TASKS["emotion"]}),
    "MMoLRE, rank 2": with_rank(2),
    "hard sharing, rank 2": hard_sharing(2),
    "MMoLRE, rank 32": with_rank(32),
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def train(config, batches, steps, rate, seed, watch=None):
    """The model after one pass over the batches; AdamW, warm-up, then down to zero in a straight line.

    watch(model, losses) sees every WATCHED-th step before its backward.
    """
    torch.manual_seed(seed)
    model = MMoLRE(config)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, (steps - n) / (steps - warm + 1))
    )
    for step, items in enumerate(batches):
        losses = mmolre.task_losses(config, forward(model, items), items.labels)
        if watch is not None and step % WATCHED == 0:
            watch(model, losses)
        loss = sum(task.weight * losses[name] for name, task in config.tasks.items())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def forward(model, items):
    names = model.config.modalities
    return model({n: items.features[n] for n in names}, {n: items.masks[n] for n in names})


def agreement(model, losses):
    """Cosine of the two tasks' gradients over what both train: projections and blocks."""
    shared = [*model.project.parameters(), *model.encoders.parameters()]
    first, second = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
        for loss in losses.values()
    )
    return float(torch.cosine_similarity(first, second, 0))


@torch.no_grad()
def judge(model, items):
    """Errors item by item and the field's metrics, of the tasks that the model has."""
    outputs, found = forward(model, items), {"parameters": parameters(model)}
    if "sentiment" in outputs:
        score, truth = outputs["sentiment"][:, 0], items.labels["sentiment"]
        found["error"] = (score - truth).abs().tolist()  # (N,)
        found["sentiment"] = sentiment_metrics(score, truth)
    if "emotion" in outputs:
        logits, truth = outputs["emotion"], items.labels["emotion"]
        found["labels"] = (logits > 0).int().tolist()  # (N, 6)
        found["emotion"] = multilabel_metrics(logits, truth)
    return found


class Plain(nn.Module):
    """The first block's formula in plain PyTorch: a pair of Conv1d an expert, one after the other."""

    def __init__(self, block):
        super().__init__()
        self.tasks, self.shared = block.tasks, block.shared
        self.router = nn.Linear(block.width, len(block.router_weight), bias=False)
        self.router.weight = nn.Parameter(block.router_weight.detach().clone())
        self.experts = nn.ModuleList()
        rows = block.lora_A.split(block.ranks, 1), block.bias_A.split(block.ranks)
        for a, b1, b, b2 in zip(*rows, block.lora_B.split(block.ranks), block.bias_B):
            first, second = (
                nn.Conv1d(block.width, len(b1), 3, padding=1),
                nn.Conv1d(len(b1), block.width, 1),
            )
            values = (a.permute(1, 2, 0), b1, b.T[..., None], b2)
            for parameter, value in zip((*first.parameters(), *second.parameters()), values):
                parameter.data.copy_(value)
            self.experts.append(nn.Sequential(first, nn.ReLU(), second))

    def forward(self, x):
        """(B, L, D) -> (tasks, B, L, D)"""
        gates = self.router(x).unflatten(-1, (self.tasks, -1)).softmax(-1)  # (B, L, tasks, N + 1)
        outputs = [expert(x.mT).mT for expert in self.experts]  # each (B, L, D)
        shared, own = outputs[: self.shared], outputs[self.shared :]
        return torch.stack(
            [
                sum(gates[:, :, t, n, None] * y for n, y in enumerate([*shared, own[t]]))
                for t in range(self.tasks)
            ]
        )


def step_times(width, rank, items, length, turns):
    """{block: (parameters, seconds of each turn)} of forward and backward, interleaved."""
    x = torch.randn(items, length, width)
    contenders, sizes = {}, {}
    for kind, r in (("low-rank", rank), ("full-rank", width)):
        block = UniTSE(width, (r,) * SHARED, (r,) * 2)
        plain = Plain(block)
        torch.testing.assert_close(plain(x), block(x), rtol=1e-3, atol=1e-4)
        for how, module in (("ours", block), ("plain PyTorch", plain)):
            contenders[f"{kind}, {how}"] = partial(_step, module, x)
            sizes[f"{kind}, {how}"] = parameters(module)
    seconds = timing.interleave(contenders, turns, laggard=float("inf"))
    return {name: (sizes[name], seconds[name]) for name in contenders}


def _step(module, x):
    module.zero_grad()
    module(x.detach().requires_grad_()).sum().backward()


def run(data, sizes, arm, seed):
    """One arm from one seed: what judge finds on the held-out items, and where its gates lie."""
    words, kaomoji, held_out = data
    batches = mmolre_data.training(words, kaomoji, sizes.steps, sizes.batch, seed)
    started = time.process_time()
    cosines = []
    watch = (lambda *step: cosines.append(agreement(*step))) if "hard sharing" in arm else None
    model = train(ARMS[arm], batches, sizes.steps, RATE, seed, watch)
    trained = time.process_time() - started
    found = judge(model, held_out) | {"trained": trained, "cosines": cosines}
    if arm == report.FIRST:
        found["gates"] = gate_shares(model, held_out)
    return found


def gate_shares(model, items):
    """{modality: (blocks, tasks, E)}: the mean gate of each expert over the positions that are there."""
    return {
        name: [block.gates[:, items.masks[name]].mean(1).tolist() for block in blocks]
        for name, blocks in model.encoders.items()
    }


@dataclasses.dataclass(frozen=True)
class Sizes:
    steps: int = STEPS
    batch: int = BATCH
    held_out: int = MOST_HELD_OUT
    words: int | None = None
    timed: tuple[int, int, int, int, int] = (768, 16, 8, 32, 9)  # width, rank, items, length, turns


QUICK = Sizes(steps=4, batch=8, held_out=40, words=300, timed=(32, 4, 2, 8, 2))


def main(argv=None):
    parser = evidence.parser(__doc__, "build/mmolre")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument(
        "--steps", type=int, help="other than the protocol's, into an --out of its own"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started, sizes = time.perf_counter(), QUICK if args.quick else Sizes()
    sizes = dataclasses.replace(sizes, steps=args.steps or sizes.steps)
    words, kaomoji = mmolre_data.load(most_words=sizes.words)
    held_out = mmolre_data.held_out(words, kaomoji, "test", sizes.held_out)
    data = words, kaomoji, held_out
    found = evidence.runs(args.out, args.arms, args.seeds, partial(run, data, sizes))
    times = step_times(*sizes.timed)
    report.write(args, sizes, data, found, times, evidence.setting(args.seeds, started))
