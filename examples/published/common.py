"""Shared by the scripts: options, error messages, JSON."""

import argparse
import json
from pathlib import Path

import torch

PUBLISHED, INFERRED = "published", "inferred"


def parser(module, description, model=None):
    """An ArgumentParser with the options of every script; `option` adds hyperparameters."""
    made = argparse.ArgumentParser(
        prog=f"python -m examples.published.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--data", type=Path, required=True, help="folder described above")
    made.add_argument("--out", type=Path, required=True, help="adapter, checkpoints, scores.json")
    if model:
        made.add_argument("--model", default=model, help="name or folder (published; %(default)s)")
    made.add_argument("--steps", type=int, help="training steps, overrides --epochs")
    made.add_argument("--limit", type=int, help="items per split, for a quick test")
    made.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    made.add_argument("--workers", type=int, default=4, help="data loading processes")
    made.add_argument("--seed", type=int, default=0)
    return made


def option(parser, name, default, origin, text):
    """Adds a hyperparameter; its help says whether the default is published or inferred."""
    parser.add_argument(
        name, type=type(default), default=default, help=f"{text} ({origin}; {default})"
    )


def optimization(parser, *, rate, batch_size, epochs, accumulate, warmup, clip):
    """Adds the options of AdamW with a cosine schedule; each argument is a pair of value and origin."""
    option(parser, "--rate", *rate, "learning rate")
    option(parser, "--batch-size", *batch_size, "items per batch")
    option(parser, "--accumulate", *accumulate, "batches per step")
    option(parser, "--epochs", *epochs, "passes over the training data")
    option(parser, "--warmup", *warmup, "share of the steps used for warmup")
    option(parser, "--clip", *clip, "maximum norm of the gradient")


def expect(path, what, source):
    """Returns `path` if it exists; otherwise raises SystemExit with what is expected and where to get it."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: expected {what}, from {source}")
    return path


def field(record, name, path):
    """record[name]; if it is missing, raises SystemExit with the field and the file."""
    if name not in record:
        raise SystemExit(f"{path}: expected the field {name!r}, got {sorted(map(str, record))[:9]}")
    return record[name]


def read_json(path):
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path}: expected JSON, got {error}") from None


def write_json(path, content):
    """Writes JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def device_and_dtype():
    """(device, dtype) of the frozen model, bf16 on a GPU; trained parameters are fp32."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def square(path, fill=(0, 0, 0)):
    """The RGB image at `path`, centered in a square of color `fill`; a plain square if path is None."""
    from PIL import Image

    if path is None:
        return Image.new("RGB", (224, 224), fill)
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    whole = Image.new("RGB", (side, side), fill)
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole
