"""Whose states the device should hold now: the waiting users whose turn is near, as far as it has pages for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mtserve.engine.queue.scheduler import PATIENCE
from mtserve.engine.request.job import Job

# Batches that a user for whom there is no room lets go first whose users have some. In a trial on virtual time (40 users,
# 5% of the working set) 4, 16 and 1000 answered 0.58, 0.77 and 0.79 times what no cache did; the more, the longer one waits.
OVERTAKEN = 16


def open_window(
    jobs: Sequence[Job],
    pages: int,
    page_tokens: int,
    held: Mapping[str, int],
    *,
    idle: bool,
    wait_for_copies: bool = False,
) -> dict[str, int]:
    """Pages kept for each of the first users of `jobs` whose prefixes fit `pages` together: more would evict one another.

    Prefetches come behind every score in `jobs` and have what the scores leave. Of that they leave alone what copies
    of others hold (`held`: device pages by user), which cannot be evicted: evicted would be what a score waits for.
    `idle`: nothing runs, so that the first user is let in whatever its size.

    `wait_for_copies`: scores too leave alone what copies hold. Let in over it, a user is encoded sooner but finds no pages,
    and its states are lost: right only where encoding is cheap beside waiting. Who does fit goes first meanwhile, until one
    who does not was overtaken by OVERTAKEN batches.
    """
    window: dict[str, int] = {}
    room, beside_copies = pages, False
    for job in jobs:
        user_id = job.user_id
        if (job.prefetch or wait_for_copies) and not beside_copies:
            beside_copies = True
            room -= sum(count for user, count in held.items() if user not in window)
        wanted = -(-len(job.sequence.chain) // page_tokens)
        more = wanted - window.get(user_id, 0)
        if more <= 0:
            continue
        if beside_copies and user_id not in window:
            more -= held.get(user_id, 0)  # counted among its own
        if more > room and (window or not idle):
            if wait_for_copies and job.overtaken < OVERTAKEN:
                continue
            break
        room -= more
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
