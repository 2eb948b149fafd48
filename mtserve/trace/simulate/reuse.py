"""How deep a user's states lie when they are asked for again: what LRU finds, for every size of a tier in one pass.

LRU keeps whoever asked last, and takes tail pages from who asked longest ago. So in front of a user's first page lie the
pages of all others who have asked since, D of them, and with C pages a tier still has the first C - D of the user's:
Mattson, Gecsei, Slutz and Traiger (1970), with sizes. Where a user's states shrink, by a new generation, the room they
leave brings back nothing that was evicted before, of which this knows nothing.
"""

from __future__ import annotations

import numpy as np

from mtserve.trace.csr import exclusive_sums
from mtserve.trace.schema import Ints, SmallInts
from mtserve.trace.simulate.demand import Demand


def previous_requests(user: SmallInts) -> Ints:
    """int64 [N]: the same user's request before each, -1 where it is the first."""
    order = np.argsort(user, kind="stable")
    same = user[order][1:] == user[order][:-1]
    found = np.full(len(user), -1, dtype=np.int64)
    found[order[1:][same]] = order[:-1][same]
    return found


def pages_between(pages: Ints, previous: Ints) -> Ints:
    """int64 [N]: pages of the other users who asked since the same user's previous request; 0 where there is none.

    `pages` [N] are what each request leaves of its user's states; of users who asked twice since, the later ones count.
    """
    count = len(pages)
    asked_before = previous >= 0
    following = np.full(count, count, dtype=np.int64)
    following[previous[asked_before]] = np.flatnonzero(asked_before)
    held = exclusive_sums(pages)  # before each request, by everybody: less those who have left something newer
    held -= exclusive_sums(np.where(asked_before, pages[previous], 0))
    queries = np.flatnonzero(asked_before)
    older = _sums_up_to(pages, following, previous[queries], queries)
    result = np.zeros(count, dtype=np.int64)
    result[queries] = held[queries] - older
    return result


def _sums_up_to(weights: Ints, keys: Ints, last: Ints, least: Ints) -> Ints:
    """int64 [Q]: the sum of weights[j] over j <= last[q] with keys[j] >= least[q].

    A tree over j whose node of 2^b leaves has their keys in order: of each level a query looks into one node at most.
    """
    count, end = len(weights), last + 1
    total = np.zeros(len(last), dtype=np.int64)
    place, span = np.arange(count, dtype=np.int64), int(keys.max(initial=0)) + 1
    for bit in range(count.bit_length()):
        looking = np.flatnonzero(end >> bit & 1)
        if not len(looking):
            continue
        order = np.argsort((place >> bit) * span + keys, kind="stable")
        ranked = ((place >> bit) * span + keys)[order]
        sums = np.concatenate(([0], np.cumsum(weights[order])))
        node = (end[looking] >> bit) - 1
        upper = np.minimum((node + 1) << bit, count)
        total[looking] += sums[upper] - sums[np.searchsorted(ranked, node * span + least[looking])]
    return total


def states_left(demand: Demand) -> tuple[Ints, SmallInts]:
    """int64 [N] tokens of the states that each request leaves, int32 [N] their generation: a new one is encoded at once."""
    anew = demand.generation_after != demand.generation
    left = np.where(anew, demand.tokens_after, demand.tokens).astype(np.int64)
    return left, np.where(anew, demand.generation_after, demand.generation)


def found_again(demand: Demand) -> Ints:
    """int64 [K]: requests whose user has asked before and left states of the generation that is wanted."""
    generation = states_left(demand)[1]
    previous = previous_requests(demand.user)
    again = np.flatnonzero(previous >= 0)
    return again[demand.generation[again] == generation[previous[again]]]


def reusable_tokens(demand: Demand) -> int:
    """Prefix tokens that all requests find in a tier that holds everything, under any policy."""
    return int(states_left(demand)[0][previous_requests(demand.user)[found_again(demand)]].sum())


def lru_hits(demand: Demand, page_tokens: int) -> Ints:
    """int64 [P + 1]: prefix tokens that all requests find in a tier of 0, 1, .. P pages under LRU; with P, all there is.

    Of a user's states those of the same generation count, up to what the request before left.
    """
    left = states_left(demand)[0]
    pages = -(-left // page_tokens)
    previous = previous_requests(demand.user)
    between, again = pages_between(pages, previous), found_again(demand)
    first, held = between[again], pages[previous[again]]
    # A tier of first + k pages finds k of them: page_tokens more for each, and what the last one has.
    size = int((first + held).max(initial=0))
    gains = np.zeros(size + 2, dtype=np.int64)
    np.add.at(gains, first + 1, page_tokens)
    np.add.at(gains, first + held, -page_tokens)
    steps = np.cumsum(gains)
    rest = left[previous[again]] - (held - 1) * page_tokens
    np.add.at(steps, first + held, rest)
    return np.cumsum(steps)[: size + 1]
