"""Adapter: reads and validates a saved adapter for serving, before the base is loaded.

Only mixtures that route per token can be served; see rules.refusal.
"""

from __future__ import annotations

import hashlib
import os

import torch
from torch import nn

from .. import safefile
from ..adapter_file import configs_of, read_info, slices_of
from ..config import LoraMoeConfig
from ..io import open_adapter
from ..tensors import adapter_tensors, file_names, under_keys
from .rules import refusal


class Adapter:
    """A file saved by save_adapter, or by PEFT for a lora_moe.peft adapter; close it after reading.

    Attributes:
        configs: {module path: LoraMoeConfig}
        digest: digest of all bytes of its files, in hexadecimal.

    Args:
        source: a directory, or a Hub repository "owner/name".
        revision: revision of a repository.
    Raises:
        ValueError: if it is damaged, is not an adapter, has missing or unexpected tensors, or cannot be
            served; every reason is listed.
        OSError: if it is missing or cannot be read.
    """

    def __init__(self, source: str | os.PathLike, revision: str | None = None):
        self.file, described = open_adapter(source, revision)
        try:
            info = read_info(self.file, described)
            self.configs: dict[str, LoraMoeConfig] = dict(configs_of(info))
            self._slices = slices_of(info)
            self.digest = self._digest(described)
            self._expect_servable(info)
            self._expect_its_tensors()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def misfit(self, path: str, D_in: int, D_out: int) -> list[str]:
        """The mismatches between the tensors of this path and a linear (D_in, D_out)."""
        problems = []
        for key, like in self._wanted(path, D_in, D_out).items():
            expected, got = tuple(like.shape), self._slices[key].shape
            if expected != got:
                problems.append(f"{key}: expected {expected}, got {got}")
        return problems

    def tensors(
        self, path: str, D_in: int, D_out: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """{name in LoraMoeLinear: full tensor}; lora_A and lora_B in `dtype`, the router's in fp32."""
        config = self.configs[path]
        names = under_keys(path, config, {name: name for name in file_names(config)})
        wanted = {
            key: like.to(dtype if names[key] in ("lora_A", "lora_B") else torch.float32)
            for key, like in self._wanted(path, D_in, D_out).items()
        }
        slices = {key: self._slices[key] for key in wanted}
        read = safefile.read_tensors(self.file, slices, wanted)
        return {names[key]: tensor for key, tensor in read.items()}

    def _wanted(self, path, D_in, D_out):
        config, linear = self.configs[path], nn.Linear(D_in, D_out, device="meta")
        return under_keys(path, config, adapter_tensors(linear, config))

    def _digest(self, described):
        self.file.seek(0)
        digest = hashlib.file_digest(self.file, "sha256")
        if described is not None:
            with safefile.open_regular(described) as file:
                digest.update(file.read())
        return digest.hexdigest()

    def _expect_servable(self, info):
        problems = []
        for path, config in self.configs.items():
            if reason := refusal(config):
                problems.append(f"{path}: {reason}")
        problems += [
            f"{path}: is in modules_to_save and fully trained; move its weights to the base's checkpoint and"
            " save the adapter without it"
            for path in info["modules_to_save"]
        ]
        safefile.raise_all("adapter: expected experts that a server can serve", problems)

    def _expect_its_tensors(self):
        configs = self.configs.items()
        expected = {key for path, c in configs for key in under_keys(path, c, file_names(c))}
        problems = [f"{key}: missing" for key in expected - self._slices.keys()]
        problems += [f"{ascii(key)[:200]}: unknown" for key in self._slices.keys() - expected]
        safefile.raise_all("adapter: expected the tensors of its configuration", problems)
