"""Watch: a forward hook that warns about misuse that would otherwise be silent."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from . import forward_records
from .context import thread
from .placement import LoraMoeLayer
from .recompute import recomputing
from .steering import adapted_path, injected

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class ParentRan:
    """Forward hook on a layer's parent, during the first full forward of the model."""

    def __init__(self):
        self.ran = False

    def __call__(self, module, args, output):
        self.ran = True


class Watch:
    """Forward hook on the model that warns about each misuse once.

    Layers that did not run although their parent did; training with all experts frozen; an auxiliary
    loss with nonzero coefficients that is never read.
    """

    def __init__(self):
        self.watched = None  # [(path, layer, hook on its nearest called ancestor)]
        self.ran = False  # whether the first full forward has ended
        self.trained = False
        self.read = False

    def begin(self, model):
        if self.ran or self.watched is not None:
            return
        hooks, self.watched = {}, []
        modules = dict(model.named_modules())
        for name, layer in modules.items():
            if not isinstance(layer, LoraMoeLayer) or not name:
                continue
            path = adapted_path(name, layer)
            parent = path.rpartition(".")[0]
            while parent and isinstance(modules[parent], _CONTAINERS):
                parent = parent.rpartition(".")[0]
            if parent not in hooks:
                hooks[parent] = ParentRan()
                if parent:
                    modules[parent].register_forward_hook(hooks[parent])
                else:  # the model itself has run when this hook is called
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
            return  # layers do not record forwards here
        if not all(layer.enabled for _, layer, _ in self.watched):
            return
        watched, self.watched, self.ran = self.watched, None, True
        idle = [
            path
            for path, layer, parent in watched
            if parent.ran and layer.active and forward_records.record_of(layer).last is None
        ]
        for module in model.modules():
            for key in [k for k, h in module._forward_hooks.items() if isinstance(h, ParentRan)]:
                del module._forward_hooks[key]
        if idle:
            warnings.warn(
                f"lora_moe: the experts of {', '.join(idle[:8])}{' ...' if idle[8:] else ''}"
                f" ({len(idle)} in all) did not run although their parent module did: it reads their"
                " weight without calling them; name them in exclude_modules",
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
                " inject after get_peft_model, prepare_model_for_kbit_training or other code that freezes"
                " parameters, and do not pass peft_config=",
                stacklevel=2,
            )

    def _tell_unread(self, model):
        if self.read:
            return
        layers = injected(model).values()
        found = [forward_records.record_of(m) for m in layers]
        if any(record.read for record in found):
            self.read = True  # the loss is in use
        elif any(record.unread > 1 for record in found):
            self.read = True
            warnings.warn(
                "lora_moe: balance_coef or z_coef is set, but backward ran without aux_loss(model)"
                " in the loss: routers may collapse; add aux_loss(model) to the loss, or set both"
                " coefficients to 0",
                stacklevel=2,
            )
