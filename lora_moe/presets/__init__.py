"""Presets: one function per paper, which returns the configuration for `inject`.

    inject(model, presets.hydralora(num_experts=3, r=8, target_modules=("q_proj", "v_proj")))

Keywords are as in LoraMoeConfig, and **fields accepts its other fields.  Experts are frozen only if they are
given as adapters=.  To choose a method, see docs/methods.md.
"""

from .adapters import Adapters, meteora, moa, xlora
from .experts import adamole, hydralora, loramoe, moelora, mola, smora
from .ffn import llava_mole, mixlora
from .sequences import conditional_mixlora, smola
from .tasks import branch_lora, c_lorae, contrastive_loss, mlore, more, mtl_lora, poly
from .two_passes import two_passes

__all__ = [
    "Adapters",
    "adamole",
    "branch_lora",
    "c_lorae",
    "conditional_mixlora",
    "contrastive_loss",
    "hydralora",
    "llava_mole",
    "loramoe",
    "meteora",
    "mixlora",
    "mlore",
    "moa",
    "moelora",
    "mola",
    "more",
    "mtl_lora",
    "poly",
    "smola",
    "smora",
    "two_passes",
    "xlora",
]
