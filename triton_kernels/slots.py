"""Slots kept apart or summed, with the segmented plan:

    apart  y_tj = base + w_tj s_e B_e A_e x_t         sum  y_t = base_t + sum over j of  w_tj s_e B_e A_e x_tj

Here each slot is a token with one expert, and `sort_slots` gives the order of the sorted tokens.
Tensors with one row per token (x if slots are apart, dy if they are summed, a base) are read through
this order by each of the token's slots, never copied.  A sum over a token's slots (y if they are summed, dx
if they are apart) is `segmented_expand` on tiles of tokens.

Letters: T tokens, K slots per token, r the largest rank.
"""

from .list_experts import list_experts
from .router_topk import RoutingBuffers
from .segmented_shrink import Segments
from .tiles import choose


def of_each_slot(routing):
    """The same routing, as T*K tokens with one slot each."""
    return RoutingBuffers(routing.indices.view(-1, 1), routing.weights.view(-1, 1))


def segments_of_slots(x, indices, order, experts, tiles="segmented"):
    """Segments of T*K tokens with one slot each, in the order of `sort_slots`."""
    tile, E = choose(tiles, x, experts.own_columns), len(experts.scaling)
    return Segments(order, *list_experts(indices, order, E, tile["BLOCK_T"]), tile)
