"""Some users of a trace, and all that they ask for: SHARDS, of Waldspurger, Park, Garthwaite and Ahmad (FAST 2015).

A user is in the sample when a hash of it is below a threshold. Two requests of one user are so both in it or both not,
and what a user finds in a tier depends only on who else asked in between: of their pages the sample has a share, so that
a tier of that share of the pages does to the sample about what the whole tier does to everybody. Sampling pages, as
blocks are, would tear users apart, whose pages come and go together; sampling requests would lengthen all times between
two of them. What remains is the luck of the draw: a few users of very long histories or very many requests weigh more
than the rest, and the sample may have too many or too few of them. What can be known of everybody at little cost takes
part of that away: capacities scale by the share of pages that the sample really has, and what it finds counts in parts of
all that it could find, of which everybody's amount is known. SHARDS-adj, which counts the accesses that the sample lacks as
hits, is two to three times as far off here (benchmarks/bench_sampling.py): users who are missing were as cold as the rest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.trace.schema import Ints, SmallInts
from mtserve.trace.simulate.config import SimulateConfig
from mtserve.trace.simulate.demand import Demand
from mtserve.trace.simulate.reuse import reusable_tokens, states_left

HASHES = 1 << 32
MASK = (1 << 64) - 1
PER_USER = ("users", "keys", "pins")


@dataclass(frozen=True)
class Sample:
    """`demand` of the users that were drawn.

    `share`: of the pages that all users' states take, those of the drawn. `ratio_per_token`: a prefix token that the
    drawn find adds to the token hit ratio of all.
    """

    demand: Demand
    share: float
    ratio_per_token: float

    def pages(self, pages: int) -> int:
        """What stands in for a tier of so many pages, at least one."""
        return max(1, round(pages * self.share))


def draw(demand: Demand, config: SimulateConfig, page_tokens: int) -> Sample:
    """The sample that `config` asks for; of at least one user who asks."""
    asking = np.unique(demand.user)
    rate = config.sample_rate or config.sample_users / max(1, len(asking))
    if rate >= 1.0:
        return everybody(demand)
    hashes = hash_users(asking, config.sample_seed)
    sampled = only(demand, asking[hashes < max(rate * HASHES, float(hashes.min()) + 1)])
    share = int(most_pages(sampled, page_tokens).sum()) / int(most_pages(demand, page_tokens).sum())
    best = reusable_tokens(demand) / max(1, _tokens(demand))
    return Sample(sampled, share, best / max(1, reusable_tokens(sampled)))


def everybody(demand: Demand) -> Sample:
    """All users."""
    return Sample(demand, 1.0, 1 / max(1, _tokens(demand)))


def _tokens(demand: Demand) -> int:
    return int(demand.tokens.sum(dtype=np.int64))


def most_pages(demand: Demand, page_tokens: int) -> Ints:
    """int64 [users]: the most that each user's states ever take; what a tier needs so that nothing is evicted."""
    pages = np.zeros(demand.users, dtype=np.int64)
    for tokens in (demand.tokens, states_left(demand)[0]):
        np.maximum.at(pages, demand.user, -(-tokens.astype(np.int64) // page_tokens))
    return pages


def hash_users(users: SmallInts, seed: int) -> npt.NDArray[np.uint64]:
    """uint64 [n] below HASHES: the upper half of the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    offset = (seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & MASK
    mixed = users.astype(np.uint64) + np.uint64(offset)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)


def only(demand: Demand, users: SmallInts) -> Demand:
    """`demand` of `users` [n], distinct and rising, who are numbered anew from 0 on."""
    numbers = np.full(demand.users, -1, dtype=np.int32)
    numbers[users] = np.arange(len(users), dtype=np.int32)
    picked = numbers[demand.user] >= 0
    columns = {item.name: getattr(demand, item.name) for item in dataclasses.fields(demand)}
    picked_columns = {name: column[picked] for name, column in columns.items() if name not in PER_USER}
    keys = None if demand.keys is None else demand.keys[users]
    pins = None if demand.pins is None else demand.pins.only(users)
    return dataclasses.replace(
        demand, users=len(users), keys=keys, pins=pins, **{**picked_columns, "user": numbers[demand.user[picked]]}
    )
