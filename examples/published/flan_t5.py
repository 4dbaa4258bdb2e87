"""Flan-T5 with C-LoRAE's experts and visual adapters: batches, losses, answers, scores."""

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    T5ForConditionalGeneration,
)

from examples.common.training import chunks
from examples.published import common
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import extraction, visual

TARGETS = r".*\.(q|k|v|o|wi|wi_0|wi_1|wo)"


class Batches:
    """Collates items of several data sets into tensors; used in the data loading processes."""

    def __init__(self, args, sets):
        self.sets, self.args = sets, args
        self.tasks = list(dict.fromkeys(found.task for found in sets.values()))
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.pixels = AutoImageProcessor.from_pretrained(args.vision)

    def __call__(self, examples):
        """[(name of the data set, item)] -> {name: tensor}"""
        prompts, answers, images, tasks = [], [], [], []
        for name, item in examples:
            task, schema = self.sets[name][:2]
            prompts.append(extraction.instruction(schema, item.text))
            answers.append(extraction.write(schema, item.records))
            images.append(common.square(item.image))
            tasks.append(self.tasks.index(task))
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        batch = dict(self.tokenizer(prompts, max_length=self.args.max_length, **options))
        labels = self.tokenizer(answers, max_length=self.args.answer_length, **options)
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        batch["pixel_values"] = self.pixels(images=images, return_tensors="pt")["pixel_values"]
        return batch | {"tasks": torch.tensor(tasks)}


class System:
    """A T5 model with experts and visual adapters, and the frozen image encoder."""

    def __init__(self, args, sets):
        self.args, self.sets = args, sets
        self.batches = Batches(args, sets)
        self.tasks = self.batches.tasks
        self.device, dtype = common.device_and_dtype()
        self.eyes = CLIPVisionModel.from_pretrained(args.vision, dtype=dtype).to(self.device).eval()
        model = T5ForConditionalGeneration.from_pretrained(args.model, dtype=dtype)
        blocks = [f"encoder.block.{i}" for i in range(model.config.num_layers)]
        width = self.eyes.config.hidden_size
        visual.add_visual(model, tuple(blocks[-args.visual_layers :]), width)
        alone = len(self.tasks) == 1
        config = c_lorae.CLoraeConfig(
            num_tasks=0 if alone else len(self.tasks), r=args.rank, alpha=args.alpha,
            gate=args.gate, mutual_information=not alone, target_modules=TARGETS,
        )  # fmt: skip
        self.model = c_lorae.inject(model, config).to(self.device).train()

    def told(self, batch):
        """Sets the samples' tasks and images for the next forward; returns (the model's batch, tasks)."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with torch.no_grad():
            seen = self.eyes(pixel_values=batch.pop("pixel_values").to(self.eyes.dtype))
        visual.set_images(self.model, seen.last_hidden_state[:, 1:].float())  # without [CLS]
        tasks = batch.pop("tasks")
        c_lorae.set_tasks(self.model, tasks)
        return batch, tasks

    def losses(self, batch):
        """{task: mean loss of its samples} for the tasks in the batch."""
        batch, tasks = self.told(batch)
        logits, labels = self.model(**batch).logits.float(), batch["labels"]
        each = cross_entropy(logits.mT, labels, reduction="none")  # (B, L), 0 where labels are -100
        each = each.sum(1) / (labels >= 0).sum(1)
        return {self.tasks[t]: each[tasks == t].mean() for t in tasks.unique().tolist()}

    @torch.no_grad()
    def answers(self, name, items):
        """The model's greedy answers to the items of data set `name`."""
        found = []
        for some in chunks(items, self.args.batch_size):
            batch, _ = self.told(self.batches([(name, item) for item in some]))
            del batch["labels"]
            ids = self.model.generate(
                **batch, max_new_tokens=self.args.answer_length, do_sample=False, num_beams=1
            )
            found += self.batches.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return found

    def ask(self, split):
        """{data set: answers} for the items of a split."""
        self.model.eval()
        said = {name: self.answers(name, getattr(data, split)) for name, data in self.sets.items()}
        self.model.train()
        return said

    def scores(self, split, said):
        """{data set: {metric: F1}} of the answers to a split."""
        found = {}
        for name, texts in said.items():
            schema, items = self.sets[name].schema, getattr(self.sets[name], split)
            read = [extraction.read(schema, text) for text in texts]
            found[name] = measures(schema, read, [item.records for item in items])
        return found

    def achieved(self):
        """{task: mean of its data sets' metrics} on the validation items."""
        values = {task: [] for task in self.tasks}
        for name, found in self.scores("valid", self.ask("valid")).items():
            values[self.sets[name].task] += found.values()
        return {task: sum(of) / len(of) for task, of in values.items()}


def measures(schema, said, wanted):
    if schema.kind != "events":
        return {"f1": extraction.f1(said, wanted).f1}
    trigger, argument = extraction.trigger_f1, extraction.argument_f1
    return {"trigger f1": trigger(said, wanted).f1, "argument f1": argument(said, wanted).f1}
