"""The measured shapes, their inputs, and the minimum FLOPs and bytes of our layer.

Letters: T tokens, E experts, K picked experts per token, r one expert's rank, R = E r rank rows,
D_in and D_out the linear's sizes.
"""

from dataclasses import dataclass

import torch

DECODE = 16  # tokens up to which a call reads more weights than activations


@dataclass(frozen=True)
class Shape:
    T: int
    D_in: int
    D_out: int
    E: int
    r: int
    K: int = 2
    routing: str = "uniform"  # or "zipf": expert e is picked in proportion to 1 / (e + 1)

    def __str__(self):
        routing = "" if self.routing == "uniform" else f" {self.routing}"
        return f"T={self.T} {self.D_in}x{self.D_out} E={self.E} r={self.r} k={self.K}{routing}"

    def flops(self, backward=False):
        """Router and picked experts only; the backward does each product twice: for x, for weights."""
        forward = 2 * self.T * (self.E * self.D_in + self.K * self.r * (self.D_in + self.D_out))
        return 3 * forward if backward else forward

    def bytes(self, itemsize, touched, backward=False):
        """Each tensor once: x, y and the weights of `touched` experts; dy, x, dx and all gradients."""
        W, D = self.E * self.D_in, self.D_in + self.D_out
        forward = self.T * D + W + touched * self.r * D
        if not backward:
            return itemsize * forward
        return itemsize * (2 * forward + self.T * self.D_in + W + self.E * self.r * D)


LINEARS = {  # D_in, D_out
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
    "Llama-7B": [(4096, 4096), (4096, 11008), (11008, 4096)],
}
CLAIMS = [
    Shape(2048, 1024, 1024, 8, 8),
    Shape(2048, 2048, 2048, 8, 16),
    Shape(2048, 2048, 2048, 64, 16),
    Shape(480, 576, 1536, 8, 8),
    Shape(16, 2048, 2048, 64, 16),
    Shape(1, 4096, 4096, 8, 16),
]
LAYERS = [
    *(Shape(T, *linear, 8, 8) for linear in LINEARS["SmolLM2-135M"] for T in (1, 480)),
    *(Shape(T, *linear, 8, 16) for linear in LINEARS["Llama-7B"] for T in (1, 16, 512)),
]
SWEEP = [
    *(Shape(T, 2048, 2048, 8, 16) for T in (1, 4, 16, 64, 256, 1024, 4096, 8192)),
    *(Shape(2048, 1024, 1024, E, 16) for E in (4, 16, 32, 64, 128)),
    *(Shape(2048, 1024, 1024, 8, r) for r in (4, 16, 32, 64)),
    *(Shape(2048, 1024, 1024, 8, 16, K) for K in (1, 4, 8)),
    *(Shape(2048, 1024, 1024, E, 16, 2, "zipf") for E in (8, 64)),
    Shape(16, 2048, 2048, 64, 16, 2, "zipf"),
]
QUICK = [Shape(64, 96, 80, 8, 4), Shape(1, 96, 80, 8, 4)]
SETS = {
    "claims": CLAIMS,
    "layers": LAYERS,
    "all": list(dict.fromkeys([*CLAIMS, *LAYERS, *SWEEP])),
}


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor  # (T, D_in)
    router: torch.Tensor  # (E, D_in)
    a: torch.Tensor  # (R, D_in)
    b: torch.Tensor  # (R, D_out)
    dy: torch.Tensor  # (T, D_out)
    ids: torch.Tensor  # (T, K), the experts that the router will pick

    @property
    def touched(self):
        return self.ids.unique().numel()


def sample(shape, dtype, device="cpu", seed=0):
    """Inputs whose routing is drawn first and then encoded in x, so that rounding does not change it.

    The router's rows are orthonormal, so  x = z - z W^T W + L W  has exactly the logits L: 0.5 apart
    between picked experts, and 2 apart between those and the rest.
    """
    g = torch.Generator().manual_seed(seed)
    T, D_in, E, K = shape.T, shape.D_in, shape.E, shape.K
    rows = E * shape.r
    ids = draw(shape, g)
    router = torch.linalg.qr(torch.randn(D_in, E, generator=g)).Q.T.contiguous()
    logits = torch.rand(T, E, generator=g)
    picked = 3 + 0.5 * torch.arange(K).expand(T, K) + 0.1 * torch.rand(T, K, generator=g)
    logits.scatter_(1, ids, picked.flip(1))
    z = torch.randn(T, D_in, generator=g)
    x = z + (logits - z @ router.T) @ router
    a = torch.randn(rows, D_in, generator=g) * D_in**-0.5
    b = torch.randn(rows, shape.D_out, generator=g) * shape.r**-0.5
    dy = torch.randn(T, shape.D_out, generator=g)
    tensors = (t.to(device, dtype) for t in (x, router, a, b, dy))
    return Inputs(*tensors, ids.to(device))


def draw(shape, generator):
    """(T, K) different experts per token: Gumbel noise on the logarithm of the popularity."""
    rank = torch.arange(1.0, shape.E + 1)
    popularity = 1 / rank if shape.routing == "zipf" else torch.ones(shape.E)
    noise = torch.empty(shape.T, shape.E).exponential_(generator=generator)
    return (popularity / noise).topk(shape.K, dim=1).indices
