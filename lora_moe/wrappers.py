"""Wrappers of a model's generate and save_pretrained that handle its experts."""

from __future__ import annotations

import inspect

from torch import nn

from .context import thread
from .model_hooks import expect_rows
from .placement import LoraMoeLayer
from .sharded import is_sharded, is_writer, reshard, whole_state
from .steering import injected


class Wrapper:
    """Replaces a method on the instance; copying the model copies it too."""

    name: str
    saves = False

    def __init__(self, model):
        self.model = model
        self.__wrapped__ = getattr(type(model), self.name)  # for its signature
        self.__doc__ = self.__wrapped__.__doc__

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(self.model, *args, **kwargs)

    def named(self, args, kwargs) -> dict:
        """All arguments by their names."""
        names = list(inspect.signature(self.__wrapped__).parameters)[1:]
        return dict(zip(names, args)) | kwargs


class Generate(Wrapper):
    name = "generate"

    def __call__(self, *args, **kwargs):
        layers = injected(self.model).values()
        expect_rows(self.model, args, kwargs, layers)  # before beams and return sequences
        thread.generating += 1
        try:
            return super().__call__(*args, **kwargs)
        finally:
            thread.generating -= 1


class SavePretrained(Wrapper):
    """save_pretrained into a folder from which from_pretrained loads the base and load_adapter the experts.

    The base's weights keep their original names.  The experts are saved in lora_moe.safetensors, and also
    with the base's weights, because Trainer resumes from a single state dict.  For the same reason, a
    model with LoRAs on its own experts is saved with fused weights, which from_pretrained also loads.
    With sharded parameters and no state_dict, every process must call it.
    """

    name = "save_pretrained"
    saves = True

    def __call__(self, *args, **kwargs):
        from .io import save_adapter  # io imports this module

        kwargs = self.named(args, kwargs)
        save_directory = kwargs.pop("save_directory")
        if any(layer.config.target_parameters for layer in injected(self.model).values()):
            kwargs.setdefault("save_original_format", False)
        reshard(self.model)
        state_dict, shards = (
            kwargs.get("state_dict"),
            [*filter(is_sharded, self.model.parameters())],
        )
        collective = shards and state_dict is None
        if collective:
            main = kwargs["is_main_process"] = is_writer(shards)
            kwargs["state_dict"] = whole_state(self.model, keep=main)
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = base_names(self.model, kwargs["state_dict"])
        thread.saving += 1
        try:
            saved = super().__call__(save_directory, **kwargs)
        finally:
            thread.saving -= 1
        if collective or kwargs.get("is_main_process", True):
            save_adapter(self.model, save_directory, state_dict=state_dict)
        return saved


class Upload(Wrapper):
    """Saves the experts before push_to_hub=True uploads the folder, inside of save_pretrained.

    PushToHubMixin has no public method for this.
    """

    name = "_upload_modified_files"
    saves = True

    def __call__(self, working_dir, *args, **kwargs):
        from .io import save_adapter

        save_adapter(self.model, working_dir)
        return super().__call__(working_dir, *args, **kwargs)


WRAPPERS = {wrapper.name: wrapper for wrapper in (Generate, SavePretrained, Upload)}


def base_names(model: nn.Module, state_dict: dict) -> dict:
    """Rename `x.base_layer.weight` to `x.weight`, the original name."""
    layers = [path for path, m in model.named_modules() if isinstance(m, LoraMoeLayer)]
    renamed = {}
    for key, value in state_dict.items():
        head, found, tail = key.partition("base_layer.")
        ours = found and head.removesuffix(".") in layers
        renamed[head + tail if ours else key] = value
    return renamed
