"""MTL-LoRA of the package adapters: one module per task, with shared A and B and diagonal cores."""

from __future__ import annotations

import torch
from adapters import MTLLoRAConfig
from adapters.methods.lora import MTLLoRA
from torch import nn

from lora_moe import inject, presets, use_routing

from .measure import Pair, Side, fill, gradients_of, mean_square, tokens

N, HEADS, R, D_IN, D_OUT = 2, 3, 4, 12, 10
TASKS = (1, 0)  # of the two samples


def mtl_lora() -> Pair:
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT).double()
    config = presets.mtl_lora(N, HEADS, R, 8, temperature=0.5, target_modules=("0",))
    ours = fill(inject(nn.Sequential(base), config))
    layer = ours[0]
    layer.middle_core.data = torch.diag_embed(layer.middle_core.diagonal(dim1=1, dim2=2)).detach()
    modules = nn.ModuleList(of_task(layer, task) for task in range(N))
    for module in modules[1:]:
        module.lora_A, module.lora_B = modules[0].lora_A, modules[0].lora_B

    def routed(x):
        with use_routing(ours, task_ids=torch.tensor(TASKS)):
            return ours(x)

    def theirs(x):
        return base(x) + torch.cat([modules[t](None, x[b, None])[0] for b, t in enumerate(TASKS)])

    def own():
        """Our gradients, reduced to the diagonals of the cores, as theirs are diagonal."""
        found = gradients_of(ours)()
        cores = found.pop("0.middle_core").diagonal(dim1=1, dim2=2)
        return found | {"0.middle_core": cores}

    def others():
        return {
            "0.lora_A": modules[0].lora_A.grad,
            "0.lora_B": modules[0].lora_B.grad.mT.flatten(0, 1),
            "0.router_table": torch.stack([m.weights.grad for m in modules]),
            "0.middle_core": torch.stack([m.task_specific.values.grad for m in modules]),
        }

    return Pair(Side(mean_square(routed), own), Side(mean_square(theirs), others), tokens(D_IN))


def of_task(layer, task) -> MTLLoRA:
    config = MTLLoRAConfig(r=R, alpha=8, n_up_projection=HEADS, weights_sharpness=0.5, dropout=0.0)
    module = MTLLoRA((R, D_IN), (D_OUT, R), config).double()
    with torch.no_grad():
        module.lora_A.copy_(layer.lora_A)
        module.lora_B.copy_(layer.lora_B.view(HEADS, R, D_OUT).mT)
        module.task_specific.values.copy_(layer.middle_core[task].diagonal())
        module.weights.copy_(layer.router_table[task])
    return module
