"""C-LoRAE (arXiv 2505.06303): Flan-T5 on multimodal entities, relations and events.

    python -m examples.published.c_lorae --data DATA --out OUT --potentials OUT_OF_EACH_TASK...

DATA holds the data sets of examples/published/extraction_data.py, or those of --datasets.  One model
learns all of them, with a universal expert and one expert for each of mner, mre and mee.

The achievement loss needs the score that each task reaches alone.  First train each task with only a
universal expert: --datasets twitter2015 twitter2017, then mnre, then m2e2, each with its own OUT; then
all, with --potentials and these three folders.  Without --potentials, the tasks have equal weights.

OUT/scores.json holds micro-F1 of whole records: of entities, relations, event triggers and event
arguments; OUT/answers.json holds the model's answers.  OUT/c_lorae.safetensors is the adapter
(c_lorae.load).
"""

import torch

from examples.published import common, extraction_data, training
from examples.published.common import INFERRED, option
from examples.published.flan_t5 import System
from lora_moe.methods import c_lorae


def arguments(argv):
    parser = common.parser("c_lorae", __doc__, model="google/flan-t5-large")
    names = list(extraction_data.READ)
    parser.add_argument("--datasets", nargs="+", choices=names, default=names)
    parser.add_argument("--potentials", nargs="+", type=common.Path, help="OUT of each task alone")
    parser.add_argument(
        "--evaluate-every",
        type=int,
        default=500,
        help="steps between evaluations for the achievement loss",
    )
    option(parser, "--vision", "openai/clip-vit-base-patch32", INFERRED, "image encoder, frozen")
    option(parser, "--rank", 24, INFERRED, "r of the universal expert; published: r / N for tasks")
    option(parser, "--alpha", 24.0, INFERRED, "each expert is scaled by alpha / its rank")
    option(
        parser,
        "--gate",
        "softmax",
        INFERRED,
        "over a token's two logits; published: that there is a gate",
    )
    option(
        parser,
        "--information",
        0.01,
        INFERRED,
        "coefficient of the mutual-information loss; published: the loss",
    )
    option(parser, "--negatives", "task", INFERRED, "of that loss: from the batch or from the task")
    option(parser, "--visual-layers", 4, INFERRED, "last encoder blocks with a visual adapter")
    option(parser, "--max-length", 512, INFERRED, "maximum tokens per instruction")
    option(parser, "--answer-length", 128, INFERRED, "maximum tokens per answer, as in UMIE")
    common.optimization(
        parser, rate=(5e-4, INFERRED), batch_size=(16, INFERRED), epochs=(30.0, INFERRED),
        accumulate=(1, INFERRED), warmup=(0.06, INFERRED), clip=(5.0, INFERRED),
    )  # fmt: skip
    return parser.parse_args(argv)


def achievement(folders, tasks):
    """The achievement loss with the potentials from single-task runs; None without `folders`."""
    if not folders:
        return None
    potentials = {}
    for path in (folder / "scores.json" for folder in folders):
        found = common.read_json(common.expect(path, "scores", "a run with one task's --datasets"))
        potentials |= common.field(found, "achieved", path)
    if set(potentials) != set(tasks):
        raise SystemExit(f"--potentials: expected {sorted(tasks)}, got {sorted(potentials)}")
    return c_lorae.AchievementLoss({task: potentials[task] for task in tasks})


def main(argv=None):
    args = arguments(argv)
    torch.manual_seed(args.seed)
    sets = {name: extraction_data.READ[name](args.data).first(args.limit) for name in args.datasets}
    system = System(args, sets)
    weigh = achievement(args.potentials, system.tasks)

    def loss_of(batch):
        losses = system.losses(batch)
        loss = weigh(losses) if weigh else sum(losses.values()) / len(losses)
        if len(system.tasks) > 1:
            told = c_lorae.mutual_information_loss(system.model, negatives=args.negatives)
            loss = loss + args.information * told
        return loss

    def watch(step):
        if weigh and step % args.evaluate_every == 0:
            weigh.update(system.achieved())

    if folder := training.newest(args.out):
        c_lorae.load(system.model, folder)
    examples = [(name, item) for name, data in sets.items() for item in data.train]
    trained = [p for p in system.model.parameters() if p.requires_grad]
    losses = training.train(
        [{"params": trained, "rate": args.rate}], examples, system.batches, loss_of, args,
        steps=training.steps_of(args, len(examples)), out=args.out, watch=watch, extra_state=weigh,
        save=lambda folder: c_lorae.save(system.model, folder),
    )  # fmt: skip
    c_lorae.save(system.model, args.out)
    said = system.ask("test")
    common.write_json(args.out / "answers.json", said)
    found = {
        "achieved": system.achieved(),
        "test": system.scores("test", said),
        "weights": dict(zip(weigh.tasks, weigh.weights().tolist())) if weigh else None,
        "loss": losses,
    }
    common.write_json(args.out / "scores.json", found)
    return found


if __name__ == "__main__":
    main()
