"""Pickles given to lora-moe convert: no code runs, and hostile files cost little time and memory."""

from __future__ import annotations

import os
import pickle
import random
import zipfile

import pytest
import torch

from lora_moe.convert import convert
from lora_moe.convert import pickles as reader

from ..support.checkpoints import changed, hydralora, moe_peft
from ..support.cost import measured


class Trace:
    """Creates a directory when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_not_run(tmp_path):
    source, *_ = hydralora(tmp_path / "source")
    trace = tmp_path / "trace"
    changed(source, lambda state: state.update({"evil": Trace(trace)}))
    with pytest.raises(ValueError, match=r"mkdir.*it was not loaded"):
        convert(source, tmp_path / "out")
    assert not trace.exists()
    torch.load(source / "adapter_model.bin", weights_only=False)
    assert trace.exists()  # an unrestricted load runs it


def archive(path, pickled, compression=zipfile.ZIP_STORED, records=()):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in records:
            file.writestr(f"archive/{name}", content)


GLOBAL = b"\x80\x02c%s\n%s\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQ"


def rebuilt(shape, strides):
    """A pickle of {"a": a tensor with one stored value and this shape and these strides}."""
    numbers = [
        b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in part) + b"t"
        for part in (shape, strides)
    ]
    head = b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n("
    return head + STORAGE + b"K\0" + b"".join(numbers) + b"\x89}tRs."


HOSTILE = {
    "bytearray": (GLOBAL % (b"__builtin__", b"bytearray") + b"J\0\0\0\x40\x85R.", "bytearray"),
    "tensor of any size": (GLOBAL % (b"torch", b"Tensor") + b"J\0\0\0\x40\x85R.", "torch Tensor"),
    "expanded": (rebuilt((1 << 20, 1 << 10), (0, 0)), "contiguous"),
    "beyond its record": (rebuilt((1 << 20, 1 << 10), (1 << 10, 1)), "state dict"),
    "many steps": (b"\x80\x02" + b"N0" * (1 << 20), "POP"),
    "many allowed steps": (b"\x80\x02" + b"N" * (1 << 20) + b".", "steps"),
    "long": (b"\x80\x02" + b"N" * (5 << 20) + b".", "one data.pkl of at most"),
    "shared tuples": (b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b".", "a shared tuple"),
    "truncated": (b"\x80\x02}X\xff\0\0\0a", "damaged"),
    "empty": (b"", "damaged"),
    "number": (b"\x80\x02K\1.", "a dict of tensors"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_cost_little(tmp_path, kind):
    pickled, message = HOSTILE[kind]
    path = tmp_path / "adapter_model.bin"
    archive(
        path, pickled, records=[("data/0", b"\0" * 4), ("byteorder", b"little"), ("version", b"3")]
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    size = path.stat().st_size
    with measured() as cost, pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "out")
    assert cost.seconds < 1 and cost.rise < 2 * size + (64 << 20)


def test_hostile_archives_cost_little(tmp_path):
    path = tmp_path / "adapter_model.bin"
    made = {
        "0 compressed": lambda: archive(path, b"\0" * (5 << 20)),
        "2 compressed": lambda: archive(
            path, b"\x80\x02}.", zipfile.ZIP_DEFLATED, [("data/0", b"\0" * (1 << 26))]
        ),
        "list of records": lambda: archive(
            path, b"", records=[(f"{i:060000}", b"") for i in range(40)]
        ),
        "an archive of torch.save": lambda: path.write_bytes(pickle.dumps({"a": 1}, 2)),
        "expected an archive": lambda: path.write_bytes(b"PK" + b"\0" * 1000),
        "one data.pkl": lambda: zipfile.ZipFile(path, "w").close(),
    }
    for message, make in made.items():
        make()
        size = path.stat().st_size
        with measured() as cost, pytest.raises(ValueError, match=message):
            reader.read_pickle(path)
        assert cost.seconds < 1 and cost.rise < 2 * size + (64 << 20), message
    path.unlink()
    path.symlink_to(tmp_path / "other.bin")
    with pytest.raises(ValueError, match="symbolic link"):
        reader.read_pickle(path)


@pytest.mark.parametrize("file", ["bin", "safetensors"])
def test_damaged_files(tmp_path, file):
    source, *_ = moe_peft(tmp_path / "source", file=file)
    path = source / f"adapter_model.{file}"
    whole, refused = path.read_bytes(), 0
    for seed in range(120):
        rng, content = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(whole))
            content[at if seed % 3 else -1 - at % 2000] = rng.randrange(256)
        path.write_bytes(content if seed % 5 else content[: rng.randrange(len(whole))])
        try:
            convert(source, tmp_path / "out")
        except (ValueError, OSError) as error:
            refused += 1
            assert str(path) in str(error) or "expected" in str(error)
    assert 30 < refused < 120
