"""What a launch reads from the L2 cache and multiplies, derived from its grid, its tiles and its operands.

A program reads its tiles regardless of the others, so an operand passes from L2 to the multiprocessors
as many times as the grid is long along the axes that do not move its tile.  Operands that are not named
are read once. Sharing between neighboring programs in hardware is not modeled.

Letters: T tokens, E experts, K picked experts per token, R rank rows, D columns of x or of y.
"""

from __future__ import annotations

from typing import NamedTuple

from lora_moe.plan import experts_in_a_tile

# axes of the grid, or columns in tiles, along which programs read the same tile of an operand
AGAIN = {
    "_rank_dense_kernel": {
        "b_ptr": (0,), "s_partial_ptr": (1,), "logits_partial_ptr": (1,),
    },
    "_router_topk_kernel": {"w_ptr": (0,)},
    "_shrink_kernel": {"x_ptr": (1,), "a_ptr": (0,), "w_ptr": (0,)},
    "_expand_kernel": {"h_ptr": (1,), "h2_ptr": (1,), "b_ptr": (0,), "b2_ptr": (0,)},
    "_wgrad_kernel": {
        "x_ptr": (1,), "h_ptr": ("D",), "h2_ptr": ("D",), "x3_ptr": (1,), "h3_ptr": ("D3",),
    },
}  # fmt: skip


class OnChip(NamedTuple):
    """One launch: bytes from L2 to the multiprocessors, tensor-core operations, programs."""

    l2: int
    flops: int
    programs: int


def on_chip(launch, read):
    """`read`: bytes of each argument that the kernel reads, each byte once."""
    programs = 1
    for n in launch.grid:
        programs *= n
    if launch.name.startswith("_segmented"):
        read = SEGMENTED[launch.name](Call(launch), read)
    else:
        axes = AGAIN.get(launch.name, {})
        read = {name: size * times(Call(launch), axes.get(name, ())) for name, size in read.items()}
    return OnChip(round(sum(read.values())), round(flops(launch)), programs)


def times(c, axes):
    n = 1
    for axis in axes:
        if isinstance(axis, str):
            n *= -(-c.get(axis) // c.get("BLOCK_D"))
        else:
            n *= c.grid[axis] if axis < len(c.grid) else 1
    return n


# --- products: a router's fp32 operand is three bf16 terms -----------------------------------------


def flops(launch):
    return 2 * sum(rows * inner * columns for rows, inner, columns in products(Call(launch)))


def products(c):
    """(rows, inner, columns) of every product, as the tensor cores compute it: padded and term by term."""
    T, E = c.get("T"), c.get("E")
    D = c.get("D") or c.get("D_in") or c.get("D_out")
    wide = (c.get("TILE_E") or 1) * (c.get("TILE_R") or 1)
    if c.name == "_rank_dense_kernel":
        if c.tensor("y_ptr"):
            yield c.tile_rows, wide, c.get("D_out")
    elif c.name == "_router_topk_kernel" and c.tensor("x_ptr"):
        yield T, D, 3 * c.get("BLOCK_E")
    elif c.name == "_shrink_kernel":
        ranks = c.grid[1] * c.get("BLOCK_R") if c.get("R") else 0
        yield c.tile_rows, D, ranks + 3 * padded(E, c.get("BLOCK_E"))
    elif c.name in ("_expand_kernel", "_wgrad_kernel"):
        R, R2 = c.get("R"), c.get("R2")
        yield T, D, padded(R, c.get("BLOCK_R")) + 3 * padded(R2, c.get("BLOCK_R2"))
        yield T, c.get("D3"), padded(c.get("R3"), c.get("BLOCK_R3"))
    elif c.name == "_segmented_wgrad_kernel":
        yield c.slots, D, c.get("BLOCK_R")
    elif c.name == "_segmented_rank_gradient_kernel":
        yield c.grid[0] * c.grid[1] * c.get("BLOCK_T"), D, c.get("TILE_R")
    elif c.name in ("_segmented_shrink_kernel", "_segmented_expand_kernel"):
        yield T, D, c.held * c.get("TILE_R")
        if c.tensor("h2_ptr"):
            yield T, D, 3 * padded(c.get("R2"), c.get("BLOCK_R2"))


def padded(n, block):
    return -(-n // block) * block if n else 0


# --- the segmented plan: contents of a tile of sorted tokens, for a router that spreads them evenly ---


class Call:
    """A launch's sizes by name."""

    def __init__(self, launch):
        self.name, self.values, self.grid = launch.name, launch.args | launch.options, launch.grid

    def get(self, name):
        value = self.values.get(name)
        return value if isinstance(value, int) else 0

    def tensor(self, name):
        return hasattr(self.values.get(name), "shape")

    @property
    def tile_rows(self):
        """Of all tiles of tokens, idle ones included."""
        return self.grid[0] * self.get("BLOCK_T")

    @property
    def slots(self):
        return self.values["order_ptr"].numel()

    @property
    def tiles(self):
        return len(self.values["number_ptr"])

    @property
    def held(self):
        """Experts of a tile."""
        return experts_in_a_tile(self.get("T"), self.get("E"), self.get("K"), self.get("BLOCK_T"))

    @property
    def rows(self):
        """Bytes of the rank rows of a tile's experts."""
        v = self.values.get("a_ptr") if self.tensor("a_ptr") else self.values["b_ptr"]
        return self.held / self.get("E") * v.numel() * v.element_size()


def segmented_shrink(c, read):
    blocks = max(1.0, c.held / c.get("TILE_E"))
    return read | {"x_ptr": read["x_ptr"] * blocks, "a_ptr": c.tiles * c.rows}


def segmented_expand(c, read):
    """Every tile of columns reads all of S, once in all for its experts, and the routing as well."""
    of_tokens = ("s_ptr", "indices_ptr", "weights_ptr", "h2_ptr")
    again = {name: read[name] * c.get("BLOCKS") for name in of_tokens if name in read}
    if c.tensor("h2_ptr"):
        again["b2_ptr"] = read["b2_ptr"] * c.tiles
    return read | again | {"b_ptr": c.tiles * c.rows}


def segmented_wgrad(c, read):
    """Every slot gathers its row of x, and every tile of columns reads all of H."""
    x = c.values["x_ptr"]
    row_blocks = c.get("TILE_R") // c.get("BLOCK_R")
    gathered = c.slots * x.shape[1] * x.element_size() * row_blocks
    return read | {"x_ptr": gathered, "h_ptr": read["h_ptr"] * c.grid[0]}


def segmented_rank_gradient(c, read):
    """Every slot gathers its row of dy, and every tile reads one expert's rows, as if all tiles were used."""
    dy, tiles = c.values["dy_ptr"], c.grid[0] * c.grid[1]
    gathered = c.slots * dy.shape[1] * dy.element_size()
    return read | {"dy_ptr": gathered, "b_ptr": tiles * read["b_ptr"] / c.get("E")}


SEGMENTED = {
    "_segmented_rank_gradient_kernel": segmented_rank_gradient,
    "_segmented_shrink_kernel": segmented_shrink,
    "_segmented_expand_kernel": segmented_expand,
    "_segmented_wgrad_kernel": segmented_wgrad,
}
