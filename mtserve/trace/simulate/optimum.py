"""The most that one tier of a size can find of a demand: Belady's optimum, of pages, by a choice that knows what comes.

It may keep nothing of a request, and so finds no less than any policy does, which always keeps whoever asked last.
"""

from __future__ import annotations

import numpy as np

from mtserve._core import _optimum
from mtserve.trace.schema import SmallInts
from mtserve.trace.simulate.demand import Demand
from mtserve.trace.simulate.reuse import states_left

OPTIMUM = "optimum"


def optimum(demand: Demand, pages: int, page_tokens: int) -> SmallInts:
    """int32 [N]: prefix tokens that each request finds in a tier of `pages` pages.

    Generations are told apart as if they were users; one that begins when a request is over is asked for then, which
    finds nothing and is left out of the result.
    """
    left, generation = states_left(demand)
    anew = np.flatnonzero(generation != demand.generation)
    places = np.concatenate((np.arange(demand.requests), anew))
    order = np.argsort(places, kind="stable")  # what a request leaves comes right after it
    user = np.concatenate((demand.user, demand.user[anew])).astype(np.int64)
    of = np.concatenate((demand.generation, generation[anew]))
    owner = np.unique(user * (int(of.max(initial=0)) + 1) + of, return_inverse=True)[1].astype(np.int32)
    tokens = np.concatenate((demand.tokens, left[anew])).astype(np.int32)
    found = np.empty(len(order), dtype=np.int32)
    known = int(owner.max(initial=-1)) + 1
    _optimum(pages, owner[order], demand.t_s[places[order]], tokens[order], found, known, page_tokens)
    asked = order < demand.requests
    return found[asked]
