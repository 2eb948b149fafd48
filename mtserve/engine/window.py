"""Whose states the device should hold now: the waiting users whose turn is near, as far as it has pages for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mtserve.engine.job import Job
from mtserve.engine.scheduler import PATIENCE


def open_window(
    jobs: Sequence[Job], pages: int, page_tokens: int, held: Mapping[str, int], *, idle: bool
) -> dict[str, int]:
    """Pages kept for each of the first users of `jobs` whose prefixes fit `pages` together: more would evict one another.

    Prefetches come behind every score in `jobs` and have what the scores leave. Of that they leave alone what copies
    of others hold (`held`: device pages by user), which cannot be evicted: evicted would be what a score waits for.
    `idle`: nothing runs, so that the first user is let in whatever its size.
    """
    window: dict[str, int] = {}
    held = dict(held)
    room, scores = pages, True
    for job in jobs:
        user_id = job.user_id
        if job.prefetch and scores:
            scores = False
            room -= sum(count for user, count in held.items() if user not in window)
        wanted = -(-len(job.sequence.chain) // page_tokens)
        more = wanted - window.get(user_id, 0)
        if more <= 0:
            continue
        if job.prefetch and user_id not in window:
            room += held.get(user_id, 0)  # counted among its own
        room -= more
        if room < 0 and (window or not idle):
            break
        window[user_id] = wanted
    return window


def in_turn(jobs: Sequence[Job], held_tokens: Callable[[Job], int]) -> list[Job]:
    """`jobs` in the order in which they get room where there is none for all; scores before prefetches, as they are.

    Given in the order of arrival, room holds at each request what the requests before it have left, and nobody finds
    anything. So, each in the order of arrival:

        who is in the midst of its prefix, or was loaded: it would have to be done again
        who let later arrivals go first for PATIENCE batches
        who has most of its prefix there, `held_tokens(job)`
        the others
    """

    def turn(job: Job) -> tuple[bool, int]:
        held = 2 * held_tokens(job) >= job.prefix
        if job.begun or (job.loads and held):
            return job.prefetch, 0
        if job.overtaken >= PATIENCE:
            return job.prefetch, 1
        return job.prefetch, 2 if held else 3

    return sorted(jobs, key=turn)
