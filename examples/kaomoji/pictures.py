"""Drawings as pictures: what a terminal would draw, each character in a cell of 16 x 16 pixels."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTCollection
from PIL import Image, ImageDraw, ImageFont

CELL, CELLS = 16, 20  # side of a cell in pixels; maximum characters per drawing
FONT_FOLDERS = (
    "/usr/share/fonts/opentype/noto",
    "/usr/share/fonts/noto-cjk",
    Path.home() / ".fonts",
)


class Eye:
    """Features (CELLS, width) of drawings: whitened pixels of each cell and its neighbors, and its position.

    The basis is the principal components of the training drawings' cells; nothing is trained.
    """

    COMPONENTS, PLACES = 64, 16
    width = 3 * COMPONENTS + PLACES

    def __init__(self, drawings):
        pixels = np.concatenate([cells(d)[: len(d)] for d in drawings])  # (n, CELL * CELL)
        self.mean = pixels.mean(0)
        values, vectors = np.linalg.eigh(np.cov(pixels - self.mean, rowvar=False))
        top = np.argsort(values)[::-1][: self.COMPONENTS]
        self.basis = vectors[:, top] / np.sqrt(values[top] + 1e-3)  # (CELL * CELL, COMPONENTS)
        angle = np.arange(CELLS)[:, None] / CELLS ** (np.arange(8) / 8)
        self.places = np.concatenate([np.sin(angle), np.cos(angle)], 1)  # (CELLS, PLACES)

    def __call__(self, drawings):
        """(features (B, CELLS, width) fp32, mask (B, CELLS))"""
        shown = np.stack([(cells(d) - self.mean) @ self.basis for d in drawings])  # (B, CELLS, C)
        mask = np.arange(CELLS) < np.array([len(d) for d in drawings])[:, None]
        shown = np.pad(shown * mask[..., None], ((0, 0), (1, 1), (0, 0)))
        places = np.broadcast_to(self.places, (len(drawings), *self.places.shape))
        features = [shown[:, :-2], shown[:, 1:-1], shown[:, 2:], places]
        return torch.from_numpy(np.concatenate(features, 2)).float(), torch.from_numpy(mask)


def cells(drawing):
    """Pixels (CELLS, CELL * CELL) in [0, 1]: one character per row, empty rows at the end."""
    drawn = np.zeros((CELLS, CELL * CELL), np.float32)
    for row, character in zip(drawn, drawing):
        row[:] = _glyph(character)
    return drawn


@cache
def _glyph(character):
    image = Image.new("L", (CELL, CELL))
    draw = ImageDraw.Draw(image)
    draw.text((CELL / 2, CELL / 2), character, 255, _font(), anchor="mm")
    return np.asarray(image, np.float32).ravel() / 255


@cache
def _font():
    for folder in FONT_FOLDERS:
        path = Path(folder) / "NotoSansCJK-Regular.ttc"
        if path.exists():
            return ImageFont.truetype(str(path), CELL - 2)
    raise SystemExit(
        "the font is missing: apt install fonts-noto-cjk (or copy its file to ~/.fonts)"
    )


@cache
def drawable():
    """The characters that the font has."""
    with TTCollection(_font().path, lazy=True) as fonts:
        return {chr(code) for code in fonts.fonts[0].getBestCmap()}
