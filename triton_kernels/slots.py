"""Slots kept apart or summed, with the segmented plan:

    apart  y_tj = base + w_tj s_e B_e A_e x_t         sum  y_t = base_t + sum over j of  w_tj s_e B_e A_e x_tj

Here each slot is a token with one expert, and `sort_slots` gives the order of the sorted tokens.
Tensors with one row per token (x if slots are apart, dy if they are summed, a base) are read through
this order by each of the token's slots, never copied.  Only a sum over a token's slots (y if they are
summed, dx if they are apart) first needs S or dS rearranged from slots to tiles of tokens
(`arrange_slots`), a few bytes per rank.

Letters: T tokens, K slots per token, r the largest rank.
"""

from .list_experts import list_experts
from .router_topk import RoutingBuffers
from .segmented_shrink import Segments
from .segmented_wgrad import sorted_slots
from .tiles import choose


def of_each_slot(routing):
    """The same routing, as T*K tokens with one slot each."""
    return RoutingBuffers(routing.indices.view(-1, 1), routing.weights.view(-1, 1))


def segments_of_slots(x, routing, experts):
    """Segments of T*K tokens with one slot each, and the input of `segmented_wgrad` in the same order."""
    tile, E = choose("segmented", x, experts.own_columns), len(experts.scaling)
    slots = sorted_slots(routing.indices, E)
    return Segments(
        slots[0], *list_experts(routing.indices, slots[0], E, tile["BLOCK_T"]), tile
    ), slots
