"""How many tokens and columns a program handles, so that the programs fill whole waves of a device.

A last wave that is half empty costs as much as a full one, while a program with fewer tokens than its tile
has rows only leaves rows idle.  So the tokens of a program are a number at run time, at most BLOCK_T.  They
change no sum: a token's sums run over the columns of D in the same order whatever its program.  BLOCK_T
itself depends on the class of T alone, and `warm_up` compiles the tiles of every class.

Letters: T tokens, E experts, R rank rows, D columns of x or of y.
"""

import functools

import torch
import triton

from .numerics import INTERPRETED
from .tiles import padded

FEWEST = 16  # tokens per program: the rows of one tensor-core instruction
CLASSES = (16, *(n * 2**i for i in range(4, 12) for n in (2, 3)), 8192)


@functools.lru_cache
def multiprocessors(device):
    """Of the device; few in the interpreter, where every program takes milliseconds."""
    if INTERPRETED:
        return 4
    with torch.cuda.device_of(torch.empty(0, device=device)):
        driver = triton.runtime.driver.active
        properties = driver.utils.get_device_properties(driver.get_current_device())
    return properties["multiprocessor_count"]


def class_of(T):
    """The number of tokens that stands for T in the choice of a tile."""
    return next((n for n in CLASSES if n >= T), CLASSES[-1])


def even(T, block, others, device):
    """Tokens per program, at most `block`, if there are `others` programs per tile of tokens.

    More than FEWEST tokens are at least two tiles: buffers of statistics have another dtype for one.
    """
    tiles = -(-T // block)
    waves = -(-tiles * others // device)
    tiles = max(tiles, min(max(2, waves * device // others), -(-T // FEWEST)))
    return -(-T // tiles)


def slowest(T, tokens, others, device, again, per_tile, once):
    """What the busiest multiprocessor reads from L2, relative to other choices.

    again     what every token costs for each of the `others`
    per_tile  what every tile of tokens costs, whatever their number
    once      what all of it costs once
    """
    tiles = -(-T // tokens)
    programs = tiles * others
    return (again * T * others + per_tile * tiles + once) * -(-programs // device) / programs


@functools.lru_cache(maxsize=4096)
def shrink_shares(T, R, E, splits, sizes, most_tokens, device):
    """(tokens, ranks) per program of `shrink` and the tile (BLOCK_T, BLOCK_R) that holds them; R > 0.

    x passes once for each program along the ranks, A and W once for each tile of tokens.  So the tile is
    about square: the smallest with which one wave holds the class of T.
    """
    at = class_of(T)
    size = next((n for n in sizes if -(-at // n) * -(-R // n) * splits <= device), sizes[-1])
    columns, block_t, found = -(-R // size), min(most_tokens, max(32, size)), []
    if size == 128 and even(at, block_t, columns * splits, device) <= 64:
        block_t = min(block_t, 64)
    for others in range(columns, 2 * columns):
        ranks = -(-R // others // 16) * 16  # stores are aligned
        others = -(-R // ranks) * splits
        tokens = even(T, block_t, others, device)
        cost = slowest(T, tokens, others, device, 1 / splits, R + 2 * E, 0)
        found.append((cost, tokens, ranks))
    return *min(found)[1:], (block_t, min(size, padded(R, 128)))


@functools.lru_cache(maxsize=4096)
def output_shares(T, D, sizes, block, again, per_tile, once, device):
    """(tokens, columns of y) per program of `rank_dense` and BLOCK_T, from bytes as in `slowest`.

    `again` and `once` are those of a token.
    """

    def choices(T, size):
        blocks = max(1, -(-D // block))
        for columns in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64):
            width = -(-blocks // columns)
            others = -(-blocks // width)
            tokens = even(T, size, others, device)
            cost = slowest(T, tokens, others, device, again, per_tile, once * T)
            yield cost, tokens, width * block

    at = class_of(T)
    size = min(sizes, key=lambda size: min(choices(at, size)))
    return *min(choices(T, size))[1:], size
