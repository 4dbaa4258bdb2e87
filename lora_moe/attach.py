"""What inject() hangs on a model, and remove() takes off again.

    hooks           read the padding mask off the model's arguments, check the batch against task ids, and
                    watch the first forwards for what would be lost in silence
    generate        marks that samples may stand several times in a row (beams, return sequences)
    save_pretrained writes the base's weights under the base's own names, and the experts beside them
    hf_quantizer    of a quantised model tells Trainer that there is something to train

Everything is an object that holds its model, so that a copied or pickled model has its own.
"""

from __future__ import annotations

import inspect
import math
import warnings

import torch
from torch import nn

from . import quantized, records
from .context import NOTHING, Call, recomputing, thread
from .layers import LoraMoeLinear
from .routing import Routing
from .sharded import is_sharded, is_writer, reshard, whole_state
from .steering import adapted_path, injected

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def attach(model: nn.Module, *, saves: bool = True) -> None:
    """Hang everything on a model that has experts; anew where it was there already.

    Without `saves`, as where PEFT saves the experts, save_pretrained stays the model's own.
    """
    detach(model)
    watch, decoders = _Watch(), _decoders(model)
    for caller in _callers(model):
        before = _BeforeCall(caller, watch if caller is model else None, caller in decoders)
        caller.register_forward_pre_hook(before, with_kwargs=True)
        caller.register_forward_hook(_AfterCall(before), always_call=True)
    model.register_forward_hook(watch)
    for owner in (model, *_models_inside(model)):
        quantized.mark(owner)
        for name, wrapper in _WRAPPERS.items():
            if (saves or not wrapper.saves) and callable(getattr(type(owner), name, None)):
                setattr(owner, name, wrapper(owner))


def _callers(model) -> dict[nn.Module, None]:
    """The model, and what inside of it is called with a mask of its own."""
    callers = dict.fromkeys((model, *_models_inside(model)))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        for name in ("get_encoder", "get_decoder"):
            if (part := _part(model, name)) is not None:
                callers[part] = None
    return callers


def _decoders(model) -> list[nn.Module]:
    """Of encoder-decoders: all that they read stands in the answer."""
    owners = [m for m in model.modules() if hasattr(type(m), "main_input_name")]
    owners = [m for m in owners if getattr(m.config, "is_encoder_decoder", False)]
    return [part for m in owners if (part := _part(m, "get_decoder")) not in (None, m)]


def _models_inside(model) -> list[nn.Module]:
    """The models of transformers with experts in them: what a wrapper, LLaVA or a Trainer may call."""
    return [
        m
        for m in model.modules()
        if m is not model and hasattr(type(m), "main_input_name") and injected(m)
    ]


def detach(model: nn.Module) -> None:
    ours = (_BeforeCall, _AfterCall, _Watch, _ParentRan)
    for module in model.modules():
        quantized.unmark(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, ours)]:
                del hooks[key]
                for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(module, flags).pop(key, None)
        for name in _WRAPPERS:
            if isinstance(vars(module).get(name), _Wrapper):
                delattr(module, name)


def _part(model, name):
    try:
        return getattr(model, name)()
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _arguments(module) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()


# --- around each call ------------------------------------------------------------------------------


class _BeforeCall:
    """A forward pre-hook that notes the masks of a call, and refuses a batch that task ids do not fit.

    `watch` is the whole model's, None for a model, an encoder or a decoder inside.  `layers` are kept: a
    forward must not look through all modules for them.
    """

    def __init__(self, caller: nn.Module, watch: _Watch | None, decodes: bool = False):
        self.names, self.watch = _arguments(caller), watch
        self.decodes = decodes
        self.names_labels = "labels" in self.names
        generates = getattr(caller, "can_generate", bool)()
        self.causal = generates and not getattr(caller.config, "is_encoder_decoder", False)
        self.layers = [m for m in caller.modules() if isinstance(m, LoraMoeLinear)]
        self.parts = any(m.parts is not None for m in self.layers)

    def __call__(self, model, args, kwargs):
        given = dict(zip(self.names, args)) | kwargs
        states = given.get("encoder_hidden_states")
        states_mask = given.get("encoder_attention_mask")
        if not torch.compiler.is_compiling():
            self.forget()
        outermost = not thread.calls
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        past = given.get("past_key_values")  # asked now: layers of this call will fill it
        cached = self.parts and hasattr(past, "get_seq_length") and int(past.get_seq_length()) > 0
        of_call = (
            self.mask_of(given),
            states,
            states_mask,
            tokens,
            self.labels_of(given),
            past,
            cached,
        )
        thread.calls.append(Call(self, *of_call))
        if outermost and not torch.compiler.is_compiling():
            _expect_rows(model, args, given, self.layers)
            if self.watch is not None:
                self.watch.begin(model)

    def mask_of(self, given):
        """Of the tokens that this model reads: its own, not that of a model around it.

        Around it stands the mask that a model has made into a dict, or expanded, for the one inside.
        """
        if (
            "decoder_attention_mask" in self.names
        ):  # attention_mask is the encoder's, with its own hook
            return given.get("decoder_attention_mask")
        mask = given.get("attention_mask")
        plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() <= 2)
        return mask if plain or not thread.calls else thread.calls[-1].mask

    def labels_of(self, given):
        """Of a causal model, whose labels are its own tokens: what its loss asks for.

        All that an encoder-decoder's decoder reads is an answer.
        """
        if self.decodes:
            ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
            return torch.zeros_like(ids) if ids is not None else _no_labels(embeds)
        if self.causal:
            return given.get("labels")
        return thread.calls[-1].labels if thread.calls and not self.names_labels else None

    def forget(self):
        """Take back this call and those inside, also ones that a KeyboardInterrupt left behind."""
        for i, call in enumerate(thread.calls):
            if call.hook is self:
                del thread.calls[i:]
                break


class _AfterCall:
    """A forward hook that takes the call back, also where the forward raised."""

    def __init__(self, before: _BeforeCall):
        self.before = before

    def __call__(self, model, args, output):
        if thread.calls and thread.calls[-1].hook is self.before:
            thread.calls.pop()
        elif not torch.compiler.is_compiling():
            self.before.forget()


def _expect_rows(model, args, given, layers):
    """Inside generate rows expand; elsewhere another number of samples is a mistake."""
    if thread.generating:
        return
    told = thread.decisions
    decisions = (_decided(m, told.get(m, NOTHING)) for m in layers if m.active)
    rows = {told.indices.shape[0] for told in decisions if isinstance(told, Routing)}
    if not rows:
        return
    main = given.get(getattr(model, "main_input_name", ""))
    tensors = [main, *args, *given.values()]
    x = next((t for t in tensors if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
    if x is None or len(rows) != 1:  # a routing of its own for each layer is checked there
        return
    (rows,), samples = rows, x.shape[0]
    tokens = math.prod(x.shape[:2]) if x.dim() <= 3 else rows  # of pixels nobody knows how many
    if rows < samples or rows not in (samples, tokens):
        raise ValueError(
            f"task_ids: expected {samples}, one per sample of the batch {tuple(x.shape)}, got {rows}"
            " (see lora_moe.use_routing; beams are told apart inside the generate of the model that inject"
            " was called with)"
        )


def _no_labels(embeds):
    return None if embeds is None else torch.zeros_like(embeds[..., 0], dtype=torch.long)


def _decided(layer, told):
    """What the caller said of the layer's samples: experts, or tasks."""
    said = (told.routing, layer.given, told.tasks, layer.tasks)
    return next((s for s in said if s is not None), None)


# --- what would be lost in silence -----------------------------------------------------------------


class _ParentRan:
    """A forward hook on a layer's parent, during the first full forward of the model."""

    def __init__(self):
        self.ran = False

    def __call__(self, module, args, output):
        self.ran = True


class _Watch:
    """A forward hook on the model that tells, once each, what a user set up and will not get.

    Layers that did not run although their parent did; experts that are all frozen in training; an
    auxiliary loss with coefficients that is never read.
    """

    def __init__(self):
        self.watched = None  # [(path, layer, hook on its nearest parent that is called)]
        self.ran = False  # the first full forward is over
        self.trained = False
        self.read = False

    def begin(self, model):
        if self.ran or self.watched is not None:
            return
        hooks, self.watched = {}, []
        modules = dict(model.named_modules())
        for name, layer in modules.items():
            if not isinstance(layer, LoraMoeLinear) or not name:
                continue
            path = adapted_path(name, layer)
            parent = path.rpartition(".")[0]
            while parent and isinstance(modules[parent], _CONTAINERS):
                parent = parent.rpartition(".")[0]
            if parent not in hooks:
                hooks[parent] = _ParentRan()
                if parent:
                    modules[parent].register_forward_hook(hooks[parent])
                else:  # the model itself, whose later hooks run after this one
                    hooks[parent].ran = True
            self.watched.append((path, layer, hooks[parent]))

    def __call__(self, model, args, output):
        if torch.compiler.is_compiling() or recomputing():
            return
        if self.watched is not None:
            self._tell_idle(model)
        if model.training and torch.is_grad_enabled():
            self._tell_frozen(model)
            self._tell_unread(model)
        if self.ran and self.trained and self.read:
            for key in [k for k, hook in model._forward_hooks.items() if hook is self]:
                del model._forward_hooks[key]

    def _tell_idle(self, model):
        if any(d.disabled for d in thread.decisions.values()):
            return  # no layer notes its forward here
        if not all(layer.enabled for _, layer, _ in self.watched):
            return
        watched, self.watched, self.ran = self.watched, None, True
        idle = [
            path
            for path, layer, parent in watched
            if parent.ran and layer.active and records.record_of(layer).last is None
        ]
        for module in model.modules():
            for key in [k for k, h in module._forward_hooks.items() if isinstance(h, _ParentRan)]:
                del module._forward_hooks[key]
        if idle:
            warnings.warn(
                f"lora_moe: the experts of {', '.join(idle[:8])}{' ...' if idle[8:] else ''}"
                f" ({len(idle)} in all) did not run although the module around them did: it reads"
                " their weight without calling them; name them in exclude_modules",
                stacklevel=2,
            )

    def _tell_frozen(self, model):
        if self.trained:
            return
        self.trained = True
        layers = injected(model).values()
        if any(layer.adapter_name is not None for layer in layers):
            return  # PEFT freezes adapters on purpose
        if not any(p.requires_grad for m in layers for p in m.parameters(recurse=False)):
            warnings.warn(
                "lora_moe: the model trains, but every expert is frozen (requires_grad=False): call"
                " inject after get_peft_model, prepare_model_for_kbit_training or whatever froze the"
                " parameters, and do not pass peft_config= with it",
                stacklevel=2,
            )

    def _tell_unread(self, model):
        if self.read:
            return
        layers = injected(model).values()
        found = [records.record_of(m) for m in layers]
        if any(record.read for record in found):
            self.read = True  # somebody adds the loss
        elif any(record.unread > 1 for record in found):
            self.read = True
            warnings.warn(
                "lora_moe: balance_coef or z_coef is set, but backward ran without aux_loss(model)"
                " in the loss: routers may collapse; add aux_loss(model) to the loss, or set both"
                " coefficients to 0",
                stacklevel=2,
            )


# --- methods of the model ----------------------------------------------------------------------------


class _Wrapper:
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


class _Generate(_Wrapper):
    name = "generate"

    def __call__(self, *args, **kwargs):
        _expect_rows(
            self.model, args, kwargs, injected(self.model).values()
        )  # before beams and return sequences
        thread.generating += 1
        try:
            return super().__call__(*args, **kwargs)
        finally:
            thread.generating -= 1


class _SavePretrained(_Wrapper):
    """save_pretrained whose folder from_pretrained reads as the base, and load_adapter as the experts.

    The base's weights have the base's own names.  The experts stand in lora_moe.safetensors, and beside
    the base's weights as well, so that Trainer's resume finds them in the one state dict that it loads.
    Where parameters are sharded and no state_dict is given, every process must call it.
    """

    name = "save_pretrained"
    saves = True

    def __call__(self, *args, **kwargs):
        from .io import save_adapter  # which imports this module

        kwargs = self.named(args, kwargs)
        save_directory = kwargs.pop("save_directory")
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


class _Upload(_Wrapper):
    """What push_to_hub=True sends: the experts must be in the folder before save_pretrained returns.

    PushToHubMixin has no public name for it.
    """

    name = "_upload_modified_files"
    saves = True

    def __call__(self, working_dir, *args, **kwargs):
        from .io import save_adapter

        save_adapter(self.model, working_dir)
        return super().__call__(working_dir, *args, **kwargs)


_WRAPPERS = {wrapper.name: wrapper for wrapper in (_Generate, _SavePretrained, _Upload)}


def base_names(model: nn.Module, state_dict: dict) -> dict:
    """The same with `x.base_layer.weight` as `x.weight`, as the model has it without experts."""
    layers = [path for path, m in model.named_modules() if isinstance(m, LoraMoeLinear)]
    renamed = {}
    for key, value in state_dict.items():
        head, found, tail = key.partition("base_layer.")
        ours = found and head.removesuffix(".") in layers
        renamed[head + tail if ours else key] = value
    return renamed
