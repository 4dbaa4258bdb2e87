"""The experts of each arm of the kaomoji experiment."""

from dataclasses import replace

from examples.kaomoji.data import LABELS
from lora_moe import LoraMoeConfig
from lora_moe.methods import c_lorae
from lora_moe.routers import TaskRouter

TASKS = tuple(LABELS)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COLLABORATIVE = c_lorae.CLoraeConfig(
    num_tasks=len(TASKS), r=24, alpha=24.0, mutual_information=True, target_modules=LINEARS
)
ONE = COLLABORATIVE.one_lora()
SHARE = -(-ONE.r // len(TASKS))  # rank of one LoRA per task, rounded up
PER_TASK = LoraMoeConfig(
    num_experts=len(TASKS),
    r=SHARE,
    top_k=1,
    alpha=float(SHARE),
    router=TaskRouter(len(TASKS), "expert"),
    target_modules=LINEARS,
    balance_coef=0.0,
    z_coef=0.0,
)
ARMS = {
    "universal only": replace(COLLABORATIVE, num_tasks=0, mutual_information=False),
    "one LoRA": ONE,
    "one LoRA per task": PER_TASK,
    "plain sum": replace(COLLABORATIVE, gate="sum"),
    "C-LoRAE": COLLABORATIVE,
}
