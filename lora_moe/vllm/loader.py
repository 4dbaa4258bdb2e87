"""The load format `lora_moe`: loads the base in another format, then adds experts to its linear layers."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.model_executor.utils import get_packed_modules_mapping

from ..safefile import raise_all
from . import LOAD_FORMAT
from .adapter import Adapter
from .bank import Banks, Projection
from .method import shard_of, wrap
from .names import places
from .options import options_of

logger = init_logger("vllm.lora_moe")


class LoraMoeLoader(BaseModelLoader):
    """Loads the base with `base_load_format`, then the adapter; both are set in additional_config."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(load_config)
        extra = load_config.model_loader_extra_config
        if isinstance(extra, dict) and "adapter" in extra:
            raise ValueError(
                "model_loader_extra_config: expected no adapter, because vLLM's compile cache does not see"
                ' it; use --additional-config \'{"lora_moe": {"adapter": DIR}}\''
            )

    def _inner(self, base_load_format="auto"):
        return get_model_loader(dataclasses.replace(self.load_config, load_format=base_load_format))

    def download_model(self, model_config: ModelConfig) -> None:
        self._inner().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self._inner().load_weights(model, model_config)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        options = options_of(vllm_config.additional_config)
        # read first, so that an unsupported adapter raises before the base is loaded
        with Adapter(options["adapter"], options.get("revision")) as adapter:
            # vLLM's compile cache depends on this, not on what a loader loads
            vllm_config.additional_config[LOAD_FORMAT]["digest"] = adapter.digest
            inner = self._inner(options.get("base_load_format", "auto"))
            model = inner.load_model(
                vllm_config=vllm_config, model_config=model_config, prefix=prefix
            )
            if model_config is not vllm_config.model_config:
                return model  # a draft model for speculative decoding
            placed = attach(model, adapter, model_config)
        logger.info(
            "lora_moe: experts of %s on %d layers of this rank",
            os.fspath(options["adapter"]),
            placed,
        )
        return model


def attach(model: nn.Module, adapter: Adapter, model_config: ModelConfig) -> int:
    """Add the adapter to the linear layers of this rank's model, and return the number of layers.

    Raises:
        ValueError: if a path is not a linear layer of the model, or one of a different size or of an
            unsupported class; all are listed, and the model is unchanged.
    """
    modules = dict(model.named_modules())
    packed = get_packed_modules_mapping(model)
    device = next(model.parameters()).device
    placed: dict[str, dict[int | None, str]] = {}
    shards, problems = {}, []
    for path in adapter.configs:
        found = list(places(path, model, modules, packed))
        if any(is_pp_missing_parameter(f"{name}.weight", model) for name, _ in found):
            continue
        name, index = next(((n, i) for n, i in found if n in modules), (None, None))
        if problem := _problem(path, name, index, modules, shards, adapter, model_config):
            problems += problem
            continue
        index = 0 if index is None and len(shards[name].widths) == 1 else index
        taken = placed.setdefault(name, {})
        if index in taken or (taken and None in (index, *taken)):
            problems.append(f"{path}: has the same outputs of {name} as {[*taken.values()]}")
        taken[index] = path
    raise_all("adapter: expected experts on linear layers of this base", problems)
    for name, by_index in placed.items():
        shard, projections = shards[name], []
        for index, path in by_index.items():
            tensors = adapter.tensors(path, shard.D_in, shard.D_out(index), model_config.dtype)
            projections.append(Projection(index, adapter.configs[path], tensors))
        wrap(modules[name], Banks(modules[name], shard, projections, model_config.dtype, device))
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return len(placed)


def _problem(path, name, index, modules, shards, adapter, model_config) -> list[str]:
    """Why experts cannot be added at a path, [] if they can; stores the layer's shard."""
    if name is None:
        return [f"{path}: no such module"]
    layer = modules[name]
    if not isinstance(layer, LinearBase):
        return [f"{path}: {name} is a {type(layer).__name__}, which does not support experts"]
    if model_config.use_mla and name.endswith("kv_b_proj"):
        return [f"{path}: latent attention reads the weight of {name} without calling it"]
    shard = shards[name] = shard_of(layer)
    if shard is None:
        return [f"{path}: {name} is a {type(layer).__name__}, whose sharding over ranks is unknown"]
    if index is not None and index >= len(shard.widths):
        return [f"{path}: {name} has {len(shard.widths)} outputs, not an output {index}"]
    whole = 0 if index is None and len(shard.widths) == 1 else index
    return adapter.misfit(path, shard.D_in, shard.D_out(whole))
