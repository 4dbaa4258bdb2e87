"""MMoLRE's block in plain PyTorch: the baseline of the timings, and faster than ours at full rank."""

import torch
from torch.nn.functional import conv1d

from lora_moe.methods.mmolre import UniTSE
from lora_moe.methods.mmolre.config import ACTIVATIONS


class PlainUniTSE(UniTSE):
    """UniTSE with the same parameters, computed with one Conv1d and one matmul for all experts."""

    def forward(self, x, mask=None):
        x = self._streams(x, mask)  # (S, B, L, D)
        logits = (x @ self.router_weight.T).unflatten(-1, (self.tasks, self.choices))
        gates = self._gates(logits, mask)  # (tasks, B, L, E)
        taps = self.lora_A.permute(1, 2, 0)  # (R, D, 3)
        s = conv1d(x.flatten(0, 1).mT, taps, self.bias_A, padding=1)  # (S B, R, L)
        s = s.mT.unflatten(0, x.shape[:2])  # (S, B, L, R)
        h = ACTIVATIONS[self.activation](s) * gates[..., self.expert_of_row]
        y = h @ self.lora_B + gates @ self.bias_B + (x if self.residual else 0)
        return y if mask is None else y.masked_fill(~mask[..., None], 0)


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """Converts the module's blocks to PlainUniTSE in place; returns the module."""
    for block in module.modules():
        if type(block) is UniTSE:
            block.__class__ = PlainUniTSE
    return module
