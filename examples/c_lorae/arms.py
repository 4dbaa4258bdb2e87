"""What C-LoRAE's example compares: the experts and the loss of each arm."""

from dataclasses import dataclass, replace

from examples.c_lorae import data as kaomoji_sets
from lora_moe.methods import c_lorae

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TASKS = tuple(kaomoji_sets.LABELS)
COLLABORATIVE = c_lorae.CLoraeConfig(
    num_tasks=3, r=24, alpha=24.0, mutual_information=True, target_modules=LINEARS
)
ONE = COLLABORATIVE.one_lora()


@dataclass(frozen=True)
class Arm:
    experts: c_lorae.CLoraeConfig
    rate: float  # of learning, for the experts
    mutual_information: float = 0.0  # coefficient
    achievement: bool = False


ARMS = {
    "universal only": Arm(replace(COLLABORATIVE, num_tasks=0, mutual_information=False), 2e-3),
    "one LoRA": Arm(ONE, 2e-3),
    "plain sum": Arm(replace(COLLABORATIVE, gate="sum"), 2e-3, 0.01),
    "C-LoRAE, equal weights": Arm(COLLABORATIVE, 2e-3, 0.01),
    "C-LoRAE": Arm(COLLABORATIVE, 2e-3, 0.01, achievement=True),
    # to explain: 24 + 8 rank rows act on a token in C-LoRAE, and s_t = 3 s_U there
    "one LoRA, active size": Arm(replace(ONE, r=32, alpha=32.0), 2e-3),
    "C-LoRAE, one scale": Arm(replace(COLLABORATIVE, task_alpha=8.0), 2e-3, 0.01),
}
