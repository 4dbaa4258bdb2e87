"""Methods of a model that know of its experts: generate and save_pretrained."""

from __future__ import annotations

import inspect

from torch import nn

from .context import thread
from .model_hooks import expect_rows
from .placement import LoraMoeLayer
from .sharded import is_sharded, is_writer, reshard, whole_state
from .steering import injected


class Wrapper:
    """Stands for a method on the instance; a copy of the model takes a copy of this with it."""

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
    """save_pretrained whose folder from_pretrained reads as the base, and load_adapter as the experts.

    The base's weights have the base's own names.  The experts stand in lora_moe.safetensors, and beside
    the base's weights as well, so that Trainer's resume finds them in the one state dict that it loads.
    For the same reason a model whose own experts have LoRAs is written with its weights fused as it has
    them, which from_pretrained reads as well: of unfused ones Trainer's resume would find none.
    Where parameters are sharded and no state_dict is given, every process must call it.
    """

    name = "save_pretrained"
    saves = True

    def __call__(self, *args, **kwargs):
        from .io import save_adapter  # which imports this module

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
    """What push_to_hub=True sends: the experts must be in the folder before save_pretrained returns.

    PushToHubMixin has no public name for it.
    """

    name = "_upload_modified_files"
    saves = True

    def __call__(self, working_dir, *args, **kwargs):
        from .io import save_adapter

        save_adapter(self.model, working_dir)
        return super().__call__(working_dir, *args, **kwargs)


WRAPPERS = {wrapper.name: wrapper for wrapper in (Generate, SavePretrained, Upload)}


def base_names(model: nn.Module, state_dict: dict) -> dict:
    """The same with `x.base_layer.weight` as `x.weight`, as the model has it without experts."""
    layers = [path for path, m in model.named_modules() if isinstance(m, LoraMoeLayer)]
    renamed = {}
    for key, value in state_dict.items():
        head, found, tail = key.partition("base_layer.")
        ours = found and head.removesuffix(".") in layers
        renamed[head + tail if ours else key] = value
    return renamed
