"""What a machine would make of a simulated run: requests a second, and how long one takes.

A sample of the trace is asked of the cost model that the engine restores by (mtserve/restore/choice.py): blocks of
neighbouring requests, spread evenly.

    latency     each request as a batch of its own on an idle machine, by the soonest way: no queue, no company
    throughput  each block as batches of a server that never waits for requests, as large as its limits and the GPU tier
                admit, one after the other; what it gains by loading for the next batch meanwhile is left out, and so
                is what client threads in the engine's process take
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mtserve.config import EngineConfig
from mtserve.restore.choice import Need, Work, user_work
from mtserve.trace.schema import Ints, SmallInts
from mtserve.trace.simulate.demand import Demand
from mtserve.trace.simulate.machine import Machine

SAMPLED = 2048


@dataclass(frozen=True)
class Forecast:
    """Requests a second of a saturated machine; quantiles of the milliseconds in which an idle one answers."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Asked:
    """The sampled requests, in blocks of up to `block`: [K] request numbers and what each sees.

    `prefix`: its tokens; `frozen`: those of them that all see one another, 0 where attention is causal.
    """

    number: Ints
    prefix: SmallInts
    frozen: SmallInts
    candidates: SmallInts
    block: int
    max_rows: int

    @classmethod
    def of(cls, demand: Demand, engine: EngineConfig) -> Asked:
        """Of `demand`, for batches as `engine` limits them."""
        block = min(engine.max_batch_requests, demand.requests)
        number = spread(demand.requests, block, max(1, SAMPLED // block))
        return cls(
            number=number,
            prefix=demand.tokens[number],
            frozen=demand.frozen[number],
            candidates=demand.candidates[number],
            block=block,
            max_rows=engine.max_batch_tokens,
        )


def spread(count: int, block: int, blocks: int) -> Ints:
    """int64 [K]: up to `blocks` runs of `block` of the numbers 0 to `count` - 1, at even distances, none twice."""
    starts = np.linspace(0, count - block, min(blocks, count // block)).astype(np.int64)
    return (starts[:, None] + np.arange(block)).ravel()


def forecast(machine: Machine, asked: Asked, gpu_pages: int, gpu_tokens: SmallInts, host_tokens: SmallInts) -> Forecast:
    """Of a run whose requests found `gpu_tokens` and `host_tokens`, int32 [N], in a GPU tier of `gpu_pages`."""
    users = [
        _user(asked, place, int(gpu_tokens[number]), int(host_tokens[number]))
        for place, number in enumerate(asked.number.tolist())
    ]
    alone = np.array([_batch_s(machine, [user]) for user in users])
    batches_s = sum(_batch_s(machine, batch) for batch in _batches(users, asked, gpu_pages * machine.page_tokens))
    p50, p99 = np.percentile(1e3 * alone, (50, 99)).tolist()
    return Forecast(len(users) / batches_s, p50, p99)


def _user(asked: Asked, place: int, gpu: int, host: int) -> Need | Work:
    """What the request at `place` needs of the host, or else computes."""
    prefix, frozen = int(asked.prefix[place]), int(asked.frozen[place])
    candidates = int(asked.candidates[place])
    if host:
        return Need(prefix, gpu, gpu + host, candidates, frozen)
    return user_work(gpu, prefix, candidates, frozen)


def _batches(users: list[Need | Work], asked: Asked, room: int) -> Iterator[list[Need | Work]]:
    """Each block in order, cut where the rows to encode pass `max_rows`, or the prefixes `room` tokens of the GPU tier."""
    for first in range(0, len(users), asked.block):
        batch: list[Need | Work] = []
        rows = tokens = 0
        for place, user in enumerate(users[first : first + asked.block], first):
            more = user.rows if isinstance(user, Work) else user.prefix - user.host + user.candidates
            prefix = int(asked.prefix[place])
            if batch and (rows + more > asked.max_rows or tokens + prefix > room):
                yield batch
                batch, rows, tokens = [], 0, 0
            batch.append(user)
            rows, tokens = rows + more, tokens + prefix
        yield batch


def _batch_s(machine: Machine, users: list[Need | Work]) -> float:
    needs = [user for user in users if isinstance(user, Need)]
    return machine.batch_s(needs, [user for user in users if isinstance(user, Work)])
