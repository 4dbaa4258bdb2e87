"""CMU-MOSI and CMU-MOSEI as MMSA's pickles, and MOSEI's emotions as a table.

    FILE.pkl     {"train": {"text": (N, L, D), "audio": ..., "vision": ..., "regression_labels": (N,),
                 "id": ["VIDEO$_$CLIP", ...], "text_bert": (N, 3, L), ...}, "valid": ..., "test": ...}
    EMOTIONS.csv file,index and either happy,sad,anger,surprise,disgust,fear (intensities), or label6
                 (index of the strongest); sentiment or label2b (its sign), used to check the rows

The pickles are aligned_50.pkl and unaligned_50.pkl, described in github.com/thuiar/Self-MM (README)
and github.com/thuiar/MMSA (src/MMSA/data_loader.py).  Padding is rows of zeros, before or after the
features; for "text", the mask of "text_bert" is used if it exists and has the same length.  The table is
All Labels of the CMU-MultimodalSDK; github.com/s3prl/s3prl has one with label6 in
s3prl/downstream/mosei/utility/CMU_MOSEI_Labels.csv.

Unpickling can run arbitrary code.  Here a pickle may only build numpy arrays of numbers and strings,
lists and dicts; any other name ends the program before it is called.
"""

import csv
import io
import pickle
from typing import NamedTuple

import numpy as np
import torch

from examples.published.common import expect, field

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
SPLITS = ("train", "valid", "test")
SOURCE = "github.com/thuiar/MMSA, Datasets"
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}
SAME_SIGN = 0.98  # required share of the clips that both files have


class Arrays(pickle.Unpickler):
    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")  # as numpy 1 wrote it
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class Split(NamedTuple):
    features: dict[str, torch.Tensor]  # {modality: (N, L, D)}
    masks: dict[str, torch.Tensor]  # {modality: (N, L)}, False at padding
    sentiment: torch.Tensor  # (N,)
    clips: list[str]


def read(path, modalities):
    """{split: Split}; features standardized by the training split's mean and spread."""
    data = unpickled(expect(path, "a pickle in MMSA's layout", SOURCE))
    if not isinstance(data, dict):
        raise SystemExit(f"{path}: expected a dict of {SPLITS}, got a {type(data).__name__}")
    splits = {name: split(field(data, name, path), modalities, path) for name in SPLITS}
    for name in modalities:
        standardize(
            [found.features[name] for found in splits.values()], splits["train"].masks[name]
        )
    return splits


def unpickled(path):
    try:
        return Arrays(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle may raise anything
        told = f"{type(error).__name__}: {error}"
        raise SystemExit(
            f"{path}: expected a pickle of numpy arrays alone, got {told:.200}"
        ) from None


def split(found, modalities, path):
    features, masks = {}, {}
    for name in modalities:
        x = np.asarray(field(found, name, path), dtype=np.float32)
        if x.ndim != 3:
            raise SystemExit(f"{path}: expected {name!r} of shape (N, L, D), got {x.shape}")
        features[name] = torch.from_numpy(np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0))
        masks[name] = (features[name] != 0).any(-1)
    tokens = np.asarray(found.get("text_bert", ()))
    if "text" in masks and tokens.ndim == 3 and tokens.shape[2] == masks["text"].shape[1]:
        masks["text"] = torch.from_numpy(tokens[:, 1] > 0)  # its features are not 0 at padding
    labels = np.asarray(field(found, "regression_labels", path), dtype=np.float32).reshape(-1)
    clips = [str(clip) for clip in field(found, "id", path)]
    sizes = {len(labels), len(clips), *(len(x) for x in features.values())}
    if len(sizes) > 1:
        raise SystemExit(f"{path}: expected as many labels, ids and features, got {sorted(sizes)}")
    return Split(features, masks, torch.from_numpy(labels), clips)


def standardize(features, mask):
    """Standardizes in place, by the training split's mean and spread; padding stays 0."""
    valid = features[0][mask].double()
    mean, spread = valid.mean(0).float(), valid.std(0).clamp(min=1e-6).float()
    for x in features:
        padding = (x == 0).all(-1, keepdim=True)
        x.sub_(mean).div_(spread).masked_fill_(padding, 0)


def emotions(path, splits):
    """(kind of task, {split: labels}): (N, 6) of 0 or 1, unknown NaN, or (N,) of 0 .. 5, unknown -100."""
    text = expect(path, "a table of emotions", "github.com/s3prl/s3prl").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    columns = rows[0] if rows else {}
    known = {f"{field(row, 'file', path)}$_${field(row, 'index', path)}": row for row in rows}
    many = all(name in columns for name in EMOTIONS)
    if not many:
        field(columns, "label6", path)
    expect_same_clips(path, known, splits)
    labels = {}
    for name, found in splits.items():
        mine = [known.get(clip) for clip in found.clips]
        if many:
            nothing = dict.fromkeys(EMOTIONS, "nan")
            values = [[float((row or nothing)[e]) for e in EMOTIONS] for row in mine]
            values = torch.tensor(values)
            labels[name] = torch.where(values.isnan(), values, (values > 0).float())
        else:
            labels[name] = torch.tensor([int(row["label6"]) if row else -100 for row in mine])
    return ("multilabel" if many else "multiclass"), labels


def expect_same_clips(path, known, splits):
    """Raises SystemExit if the sentiments' signs differ: clips are numbered differently in some releases."""
    sign = "sentiment" if "sentiment" in next(iter(known.values()), ()) else "label2b"
    equal = [
        np.sign(float(field(known[clip], sign, path))) == np.sign(float(value))
        for found in splits.values()
        for clip, value in zip(found.clips, found.sentiment)
        if clip in known
    ]
    if not equal or np.mean(equal) < SAME_SIGN:
        share = f"{np.mean(equal):.0%}" if equal else "none"
        raise SystemExit(
            f"{path}: expected clips of the same sentiment in both files, got {share} of {len(equal)}"
        )
