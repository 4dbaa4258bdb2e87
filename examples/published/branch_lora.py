"""BranchLoRA (arXiv 2506.02041): LLaVA-1.5-7B on the eight tasks of CoIN, one after another.

    python -m examples.published.branch_lora --data DATA --images IMAGES --out OUT

examples/published/coin_data.py describes the contents of DATA and IMAGES.  After each task, the branches
that it used most are frozen, and all tasks so far are evaluated; each question's router is chosen by the
selector, not by the task's name.

OUT/scores.json holds the accuracy on task j after task i, ACC, MAA and BWT, and how often the selector
was right; OUT/answers.json holds the last answers.  OUT/branch_lora.safetensors is the state
(branch_lora.load) from which a stopped run resumes; within a task, it resumes from a checkpoint.
"""

import shutil

import torch

from examples.published import coin_data, common, training
from examples.published.common import INFERRED, PUBLISHED, option
from examples.published.llava import PROJECTOR, System
from lora_moe.methods import branch_lora as bl


def arguments(argv):
    parser = common.parser("branch_lora", __doc__, model="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--images", type=common.Path, required=True, help="see above")
    parser.add_argument("--test-items", type=int, help="test questions per task (default: all)")
    parser.add_argument("--tasks", nargs="+", choices=coin_data.TASKS, default=coin_data.TASKS)
    option(parser, "--branches", 8, PUBLISHED, "E")
    option(parser, "--rank", 16, PUBLISHED, "r of the trunk and of each branch")
    option(
        parser, "--top-k", 2, PUBLISHED, "branches per sequence, and branches frozen after a task"
    )
    option(
        parser,
        "--alpha",
        256.0,
        PUBLISHED,
        "for the total rank: branches are scaled by alpha / (E r)",
    )
    option(
        parser, "--route-by", "mean", INFERRED, "what picks branches; the first token in the paper"
    )
    option(parser, "--projector-rate", 2e-5, INFERRED, "learning rate of the projector, as in CoIN")
    option(parser, "--selector-items", 2000, INFERRED, "training items used for a task's keys")
    option(parser, "--max-length", 2048, INFERRED, "tokens, as in CoIN")
    option(parser, "--answer-length", 64, INFERRED, "maximum tokens per answer")
    common.optimization(
        parser, rate=(2e-4, INFERRED), batch_size=(12, INFERRED), epochs=(1.0, INFERRED),
        accumulate=(8, INFERRED), warmup=(0.03, INFERRED), clip=(1.0, INFERRED),
    )  # fmt: skip
    return parser.parse_args(argv)


def learn(system, samples, folder):
    """Trains one task, from its beginning or its checkpoint; returns the losses."""
    args = system.args
    if not system.learning:
        bl.begin_task(system.model)
        system.selector.begin_task()
        for some, batch in system.batches(samples[: args.selector_items]):
            system.selector.observe(*system.keys(some, batch))
    tuned = set(system.model.get_submodule(PROJECTOR).parameters())
    trained = [p for p in system.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in tuned], "rate": args.rate},
        {"params": [p for p in trained if p in tuned], "rate": args.projector_rate},
    ]
    system.model.train()
    losses = training.train(
        groups, samples, system.conversations, system.loss, args, out=folder,
        steps=training.steps_of(args, len(samples)),
        save=lambda folder: bl.save(system.model, folder, system.selector),
    )  # fmt: skip
    system.model.eval()
    bl.end_task(system.model)
    return losses


def main(argv=None):
    args = arguments(argv)
    torch.manual_seed(args.seed)
    path = args.out / "scores.json"
    found = (
        common.read_json(path) if path.exists() else {"accuracy": [], "selector": [], "loss": []}
    )
    done = len(found["accuracy"])
    data = [args.data, args.images]
    count = args.test_items or args.limit
    tests = [coin_data.test_samples(*data, task)[:count] for task in args.tasks]
    folder = training.newest(args.out / f"task-{done}")
    if folder is None and done:
        folder = args.out
    system = System(args, folder)
    for number, task in list(enumerate(args.tasks))[done:]:
        samples = coin_data.training_samples(*data, task)[: args.limit]
        here = args.out / f"task-{number}"
        found["loss"].append(learn(system, samples, here))
        bl.save(system.model, args.out, system.selector)
        said, accuracy, chosen = zip(*(system.ask(j, tests[j]) for j in range(number + 1)))
        found["accuracy"].append(list(accuracy))
        found["selector"].append(list(chosen))
        common.write_json(args.out / "answers.json", dict(zip(args.tasks, said)))
        found |= bl.continual_metrics(found["accuracy"])._asdict()
        common.write_json(path, found)
        shutil.rmtree(here)
    return found


if __name__ == "__main__":
    main()
