"""LLaVA-1.5 with BranchLoRA's branches: conversations, the selector's keys, answers."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, LlavaForConditionalGeneration

from examples.common.training import chunks
from examples.published import coin_data, common
from lora_moe.methods import branch_lora as bl

LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
PROJECTOR = "model.multi_modal_projector"
OPENING = (  # of the Vicuna v1 prompt, which LLaVA-1.5 uses
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)


class Conversations:
    """Collates samples into tensors; used in the data loading processes."""

    def __init__(self, args):
        self.max_length = args.max_length
        self.processor = AutoProcessor.from_pretrained(args.model)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # for questions, which are answered in batches

    def questions(self, samples, **options):
        """The samples' first questions with their images, as tensors."""
        texts = [f"{OPENING} USER: {sample.turns[0][0]} ASSISTANT:" for sample in samples]
        fill = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        images = [common.square(sample.image, fill) for sample in samples if sample.image]
        return self.processor(text=texts, images=images or None, **options)

    def __call__(self, samples):
        """Conversations, padded on the right; the labels are the answers and their end tokens."""
        batch, rows, labels = self.questions(samples), [], []
        for ids, sample in zip(batch["input_ids"], samples):
            row, label = list(ids), [-100] * len(ids)
            for number, (question, answer) in enumerate(sample.turns):
                text = self.plain(f"USER: {question} ASSISTANT:") if number else []
                told = [*self.plain(answer), self.tokenizer.eos_token_id]
                row += text + told
                label += [-100] * len(text) + told
            rows.append(torch.tensor(row[: self.max_length]))
            labels.append(torch.tensor(label[: self.max_length]))
        made = {
            "input_ids": pad_sequence(rows, True, self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0),
            "labels": pad_sequence(labels, True, -100),
        }
        if "pixel_values" in batch:
            made["pixel_values"] = torch.stack([torch.as_tensor(p) for p in batch["pixel_values"]])
        return made

    def plain(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class System:
    """A LLaVA model with branches, and the selector that identifies a question's task."""

    def __init__(self, args, folder):
        """`folder` has a saved state to resume from, or is None."""
        self.args, self.conversations = args, Conversations(args)
        self.device, dtype = common.device_and_dtype()
        self.model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=dtype)
        # in bf16 its small updates would be rounded away
        projector = self.model.get_submodule(PROJECTOR).float()
        projector.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
        if folder is None:
            config = bl.branch_lora(
                args.branches, args.rank, args.top_k, args.alpha, target_modules=LINEARS
            )
            bl.inject(self.model, config, route_by=args.route_by, modules_to_save=(PROJECTOR,))
            sizes = self.model.config.text_config, self.model.config.vision_config
            self.selector = bl.TaskSelector(*(size.hidden_size for size in sizes))
        else:
            self.selector = bl.load(self.model, folder)
        self.model.to(self.device)
        self.selector.to(self.device)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def learning(self):
        """Whether a task has begun and not ended."""
        return bl.state_of(self.model)[1].learning

    def loss(self, batch):
        return self.model(**{name: t.to(self.device) for name, t in batch.items()}).loss

    def batches(self, samples):
        """Yields (samples, their questions as tensors) in batches."""
        for some in chunks(samples, self.args.batch_size):
            batch = self.conversations.questions(some, padding=True, return_tensors="pt")
            yield some, batch.to(self.device)

    @torch.no_grad()
    def keys(self, samples, batch):
        """Mean frozen embeddings of texts (B, D) and images (B, D_v); 0 where there is no image."""
        texts = [sample.turns[0][0].replace(coin_data.IMAGE, "") for sample in samples]
        tokens = self.conversations.tokenizer(texts, padding=True, return_tensors="pt")
        tokens = tokens.to(self.device)
        mask = tokens["attention_mask"][..., None].float()
        words = self.model.get_input_embeddings()(tokens["input_ids"]).float()
        text = (words * mask).sum(1) / mask.sum(1)
        image = text.new_zeros(len(samples), self.selector.image_keys.shape[1])
        there = [number for number, sample in enumerate(samples) if sample.image]
        if there:
            seen = self.model.model.vision_tower(batch["pixel_values"].to(self.model.dtype))
            image[there] = seen.last_hidden_state.float().mean(1)
        return text, image

    @torch.no_grad()
    def ask(self, number, samples):
        """(answers on task `number`, their mean score, share of correct choices of the selector)."""
        said, points, chosen = [], [], []
        for some, batch in self.batches(samples):
            tasks = self.selector(*self.keys(some, batch))
            bl.set_task(self.model, tasks)
            ids = self.model.generate(
                **batch, max_new_tokens=self.args.answer_length, do_sample=False
            )
            new = ids[:, batch["input_ids"].shape[1] :]
            texts = self.conversations.tokenizer.batch_decode(new, skip_special_tokens=True)
            texts = [text.strip() for text in texts]
            task = self.args.tasks[number]
            points += [coin_data.right(task, text, s) for text, s in zip(texts, some)]
            chosen += (tasks == number).tolist()
            said += texts
        return said, sum(points) / len(points), sum(chosen) / len(chosen)
