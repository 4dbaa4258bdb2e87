"""C-LoRAE: collaborative multi-LoRA experts for generative multimodal information extraction.

    y_i = W0 x_i + g1(x_i) s_U B_U A_U x_i + g2(x_i) s_t B_t A_t x_i             t: the sample's task

One *universal* expert U of rank r is used by every task; each *task* expert of rank r / N by one task.  A
gate in each linear layer weights the two per token.  Expert 0 of the layer is U and expert 1 + t belongs to
task t, so a token has two slots, and one call of F.grouped_lora runs both for any mix of tasks, without a
loop over experts.

    config.py         CLoraeConfig, and the corresponding LoraMoeConfig
    adapters.py       adds experts to a model, and sets a batch's tasks
    information.py    mutual_information_loss keeps universal and task experts from collapsing
    files.py          experts and visual adapters on disk
    achievement.py    the loss that balances the tasks
    visual.py         adds image features to the model
    extraction.py     instructions, answers and scores

Source: Collaborative Multi-LoRA Experts with Achievement-based Multi-Tasks Loss for Unified Multimodal
Information Extraction, IJCAI 2025, arXiv 2505.06303.
"""

from .achievement import AchievementLoss
from .adapters import CollaborativeLinear, inject, layers_of, set_tasks
from .config import CLoraeConfig
from .files import FILE_NAME, load, save
from .information import info_nce, mutual_information_loss
from .visual import GatedVisual, add_visual, set_images

__all__ = [
    "FILE_NAME",
    "AchievementLoss",
    "CLoraeConfig",
    "CollaborativeLinear",
    "GatedVisual",
    "add_visual",
    "info_nce",
    "inject",
    "layers_of",
    "load",
    "mutual_information_loss",
    "save",
    "set_images",
    "set_tasks",
]
