"""Fast mixtures of LoRA experts: router, top-k and experts in one pass over x, forward and backward."""

import importlib
from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "triton_kernels").is_dir() and not (_checkout / "lora_moe/triton_kernels").exists():
    # in a checkout, the kernels are next to this folder; make them importable as lora_moe.triton_kernels
    __path__.append(str(_checkout))

from . import backend  # noqa: E402

backend.load()

from . import autograd, functional, losses, middles  # noqa: E402, F401  registers the middles that files name
from .backend import backend_info  # noqa: E402
from .config import LoraMoeConfig  # noqa: E402
from .context import checkpoint_context  # noqa: E402
from .from_peft import from_peft  # noqa: E402
from .generated import fill_expert  # noqa: E402
from .graft import graft_weights  # noqa: E402
from .growing import grow  # noqa: E402
from .injection import inject, remove  # noqa: E402
from .io import adapter_info, load_adapter, save_adapter  # noqa: E402
from .layers import LoraMoeLinear  # noqa: E402
from .losses import aux_loss, router_stats  # noqa: E402
from .merging import merge  # noqa: E402
from .mlp import LoraMoeMLP  # noqa: E402
from .native_experts import LoraMoeExperts  # noqa: E402
from .routing import Routing  # noqa: E402
from .steering import (  # noqa: E402
    disable_adapters,
    freeze_experts,
    injected,
    set_routing,
    use_routing,
)
from .to_peft import to_peft  # noqa: E402
from .warmup import warm_up  # noqa: E402

__version__ = "0.2.0"

# imported on first use: these need packages that the layers do not
_ON_FIRST_USE = ("convert", "hf", "peft", "presets", "vllm")


def __getattr__(name):
    if name in _ON_FIRST_USE:
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise ImportError(
                    f"lora_moe.{name}: requires the package {error.name}, which is not installed;"
                    f" run pip install {error.name}"
                ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    here = Path(__file__).parent
    there = [n for n in _ON_FIRST_USE if (here / n).is_dir() or (here / f"{n}.py").exists()]
    return sorted({*globals(), *there})


__all__ = [
    "LoraMoeConfig",
    "LoraMoeExperts",
    "LoraMoeLinear",
    "LoraMoeMLP",
    "Routing",
    "adapter_info",
    "autograd",
    "aux_loss",
    "backend_info",
    "checkpoint_context",
    "disable_adapters",
    "fill_expert",
    "freeze_experts",
    "from_peft",
    "functional",
    "graft_weights",
    "grow",
    "inject",
    "injected",
    "load_adapter",
    "losses",
    "merge",
    "remove",
    "router_stats",
    "save_adapter",
    "set_routing",
    "to_peft",
    "use_routing",
    "warm_up",
]
