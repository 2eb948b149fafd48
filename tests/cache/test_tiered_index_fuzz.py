"""Any interleaving of begins, ends, failures, corrections and invalidations, on tiers far too small."""

from __future__ import annotations

import random

import pytest
from tiered_index_world import WIDTH, World

USERS = [f"user-{i}" for i in range(7)]


def _request(rng: random.Random, histories: dict[str, list[int]], user: str, limit: int) -> list[int]:
    """The user's history now: mostly grown, at times corrected, restarted, or asked about as it was before."""
    history, dice = histories[user], rng.random()
    if dice < 0.25 and history:
        history[rng.randrange(len(history))] = rng.getrandbits(40)
    elif dice < 0.30:
        history.clear()
    elif dice < 0.40:
        return history[: rng.randrange(len(history) + 1)]
    history += [rng.getrandbits(40) for _ in range(rng.randrange(9))]
    del history[limit:]
    return list(history)


def _step(world: World, rng: random.Random, histories: dict[str, list[int]]) -> None:
    limit = WIDTH * world.size
    free = [user for user in USERS if not world.open_kinds(world.known.get(user)) & {"batch", "load"}]
    user, dice = rng.choice(USERS), rng.random()
    if dice < 0.22 and free:
        users = rng.sample(free, rng.randint(1, min(3, len(free))))
        world.begin_batch(users, [_request(rng, histories, name, limit) for name in users])
    elif dice < 0.36:
        behind = [name for name, known in world.known.items() if known.host > known.gpu]
        user = rng.choice(behind or USERS) if rng.random() < 0.8 else user
        asked = histories[user] if rng.random() < 0.7 else _request(rng, histories, user, limit)
        world.begin_copy("load", user, asked)
    elif dice < 0.52:
        world.begin_copy("store", user, [])
    elif dice < 0.70 and world.jobs:
        world.advance(rng.choice(world.jobs), rng.randint(1, 4))
    elif dice < 0.93 and world.jobs:
        world.end(rng.choice(world.jobs), rng.random() < 0.8)
    elif dice < 0.95:
        world.invalidate(user)
    world.look(user, histories[user])


# What every run must have met to mean anything, and what its sizes make it meet besides.
ALWAYS = {
    *("batch", "load", "store", "failed batch", "failed store"),
    *("correction", "correction during store", "stale end", "short batch"),
}


@pytest.mark.parametrize(
    ("seed", "page_tokens", "gpu_pages", "host_pages", "met"),
    [
        (1, 4, 20, 30, {"short load", "failed load"}),
        (2, 3, 12, 9, {"short store", "failed load"}),
        (3, 1, 25, 40, {"failed load"}),
        (4, 5, 6, 14, {"short load"}),
        (5, 4, 40, 8, {"short load", "short store"}),
        (6, 4, 60, 80, {"failed load"}),
        (7, 2, 14, 60, {"short load", "failed load"}),
    ],
)
def test_fuzz(seed: int, page_tokens: int, gpu_pages: int, host_pages: int, met: set[str]):
    rng = random.Random(seed)
    world = World(rng, page_tokens, gpu_pages, host_pages)
    histories: dict[str, list[int]] = {user: [] for user in USERS}
    for _ in range(2500):
        _step(world, rng, histories)
    while world.jobs:
        world.end(rng.choice(world.jobs), rng.random() < 0.5)
    stats = world.index.stats()
    assert stats.gpu.in_flight == stats.host.in_flight == stats.detached == 0
    assert stats.batches_in_flight == stats.loads_in_flight == stats.stores_in_flight == 0
    assert world.seen >= ALWAYS | met
    assert world.evictions > 100
    assert world.index.invalidate_all() == stats.users
    world.index.check()
    assert world.index.stats().gpu.free == gpu_pages
    assert world.index.stats().host.free == host_pages
