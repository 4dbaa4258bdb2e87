"""MMoLRE (arXiv 2505.14143): sentiment and emotions of CMU-MOSI and CMU-MOSEI from text and audio.

    python -m examples.published.mmolre --data aligned_50.pkl --emotions EMOTIONS.csv --out OUT

The files are those of examples/published/affect_data.py; without --emotions, sentiment is the only task,
as for CMU-MOSI.  The paper uses features of RoBERTa and data2vec (both of width 768); those of MMSA are
from BERT, COVAREP and Facet.  To use the former, store them as "text" and "audio" in the same layout.

The model with the lowest validation loss is saved as OUT/mmolre.safetensors (mmolre.load); its test scores
are written to OUT/scores.json.
"""

import torch

from examples.published import affect_data, common, training
from examples.published.common import INFERRED, PUBLISHED, option
from lora_moe.methods import mmolre
from lora_moe.methods.mmolre import MMoLRE, MMoLREConfig, Task
from lora_moe.methods.mmolre.affect import (
    multiclass_metrics,
    multilabel_metrics,
    sentiment_metrics,
)

FILE = "mmolre.safetensors"
MEASURES = {"multiclass": multiclass_metrics, "multilabel": multilabel_metrics}


def arguments(argv):
    parser = common.parser("mmolre", __doc__)
    parser.add_argument("--emotions", type=common.Path, help="the table described above")
    parser.add_argument(
        "--modalities", nargs="+", default=["text", "audio"], help="(published; %(default)s)"
    )
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between validations")
    option(parser, "--width", 768, PUBLISHED, "width of the experts")
    option(parser, "--blocks", 2, PUBLISHED, "UniTSE blocks per modality")
    option(
        parser,
        "--shared",
        4,
        INFERRED,
        "shared experts; published: plus one expert per task",
    )
    option(parser, "--rank", 16, INFERRED, "rank of each expert")
    option(parser, "--dropout", 0.1, INFERRED, "before the heads")
    common.optimization(
        parser, rate=(1e-4, INFERRED), batch_size=(32, INFERRED), epochs=(30.0, INFERRED),
        accumulate=(1, INFERRED), warmup=(0.05, INFERRED), clip=(1.0, INFERRED),
    )  # fmt: skip
    return parser.parse_args(argv)


class Clips(torch.utils.data.Dataset):
    """The clips of a split, each as (features, masks, labels)."""

    def __init__(self, split, labels, limit):
        self.split, self.labels = split, labels
        self.count = len(split.clips[:limit])

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        parts = (self.split.features, self.split.masks, self.labels)
        return [{name: tensor[i] for name, tensor in part.items()} for part in parts]


def collate(clips):
    """[(features, masks, labels)] -> [features, masks, labels], batched."""
    return [
        {name: torch.stack([c[k][name] for c in clips]) for name in clips[0][k]} for k in range(3)
    ]


def load(args):
    """({split: Clips}, {task: Task})"""
    splits = affect_data.read(args.data, args.modalities)
    tasks = {"sentiment": Task("mae")}
    labels = {name: {"sentiment": split.sentiment} for name, split in splits.items()}
    if args.emotions:
        kind, found = affect_data.emotions(args.emotions, splits)
        tasks["emotion"] = Task(kind, len(affect_data.EMOTIONS))
        for name, values in found.items():
            labels[name]["emotion"] = values
    clips = {name: Clips(split, labels[name], args.limit) for name, split in splits.items()}
    return clips, tasks


class Judge:
    """Computes outputs, loss and the standard metrics of a split."""

    def __init__(self, model, clips, args, device):
        self.model, self.clips, self.args, self.device = model, clips, args, device

    def place(self, batch):
        return [{name: t.to(self.device) for name, t in part.items()} for part in batch]

    def loss(self, batch):
        features, masks, labels = self.place(batch)
        return mmolre.total_loss(self.model.config, self.model(features, masks), labels)

    @torch.no_grad()
    def outputs(self, split):
        """({task: (N, outputs)}, {task: labels}) on the CPU."""
        self.model.eval()
        loader = torch.utils.data.DataLoader(
            self.clips[split], self.args.batch_size, collate_fn=collate, generator=torch.Generator()
        )
        found = []
        for batch in loader:
            features, masks, _ = self.place(batch)
            outputs = {task: out.cpu() for task, out in self.model(features, masks).items()}
            found.append((outputs, batch[2]))
        self.model.train()
        return [
            {task: torch.cat([part[k][task] for part in found]) for task in found[0][0]}
            for k in (0, 1)
        ]

    def scores(self, split):
        """{task: {metric: value}}; clips with unknown emotions do not count."""
        outputs, labels = self.outputs(split)
        scores = {"sentiment": sentiment_metrics(outputs["sentiment"][:, 0], labels["sentiment"])}
        if "emotion" in outputs:
            kind, true = self.model.config.tasks["emotion"].loss, labels["emotion"]
            there = (true >= 0).all(-1) if kind == "multilabel" else true >= 0
            scores["emotion"] = MEASURES[kind](outputs["emotion"][there], true[there])
        return scores


def main(argv=None):
    args = arguments(argv)
    torch.manual_seed(args.seed)
    clips, tasks = load(args)
    device, _ = common.device_and_dtype()
    if folder := training.newest(args.out):
        model = mmolre.load(folder / FILE).train()
    else:
        widths = {n: x.shape[-1] for n, x in clips["train"].split.features.items()}
        model = MMoLRE(
            MMoLREConfig(
                widths, tasks, args.width, (args.rank,) * args.shared, args.rank, args.blocks,
                dropout=args.dropout,
            )
        )  # fmt: skip
    judge = Judge(model.to(device), clips, args, device)
    steps = training.steps_of(args, len(clips["train"]))
    best = args.out / "best.json"

    def watch(step):
        if step % args.evaluate_every and step != steps:
            return
        loss = float(mmolre.total_loss(model.config, *judge.outputs("valid")))
        if not best.exists() or loss < common.read_json(best)["loss"]:
            args.out.mkdir(parents=True, exist_ok=True)
            mmolre.save(model, args.out / FILE)
            common.write_json(best, {"loss": loss, "step": step})

    losses = training.train(
        [{"params": list(model.parameters()), "rate": args.rate}], clips["train"], collate, judge.loss,
        args, steps=steps, out=args.out, watch=watch,
        save=lambda folder: mmolre.save(model, folder / FILE),
    )  # fmt: skip
    judge.model = mmolre.load(args.out / FILE).to(device)
    found = {"best": common.read_json(best), "loss": losses}
    found |= {split: judge.scores(split) for split in ("valid", "test")}
    common.write_json(args.out / "scores.json", found)
    return found


if __name__ == "__main__":
    main()
