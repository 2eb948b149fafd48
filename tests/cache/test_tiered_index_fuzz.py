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
    elif dice < 0.28:
        history.clear()
    elif dice < 0.50:
        return history[: rng.randrange(len(history) + 1)]
    history += [rng.getrandbits(40) for _ in range(rng.randrange(9))]
    del history[limit:]
    return list(history)


def _begin_batch(world: World, rng: random.Random, histories: dict[str, list[int]]) -> None:
    free = [user for user in USERS if "batch" not in world.open_kinds(world.known.get(user))]
    loading = [user for user in free if "load" in world.open_kinds(world.known.get(user))]
    users = rng.sample(free, min(rng.randint(1, 3), len(free)))
    if loading and not set(users) & set(loading):
        users[0] = rng.choice(loading)
    if users:
        tokens = [_request(rng, histories, user, WIDTH * world.size) for user in users]
        world.begin_batch(users, tokens, [rng.random() < 0.3 for _ in users])


def _begin_load(world: World, rng: random.Random, histories: dict[str, list[int]]) -> None:
    behind = [user for user, known in world.known.items() if known.host > known.gpu]
    user = rng.choice(behind or USERS) if rng.random() < 0.8 else rng.choice(USERS)
    asked = histories[user] if rng.random() < 0.7 else _request(rng, histories, user, WIDTH * world.size)
    world.begin_load(user, asked)


def _begin_stores(world: World, rng: random.Random) -> None:
    ahead = [user for user, known in world.known.items() if known.gpu > known.host]
    users = ahead if rng.random() < 0.7 else USERS
    world.begin_stores(rng.sample(users, rng.randint(0, len(users))), rng.random() < 0.7, rng.randrange(9))


def _end(world: World, rng: random.Random) -> None:
    job = rng.choice(world.jobs)
    world.end(job, rng.random() < (0.6 if job.kind == "load" else 0.8))


def _privilege(world: World, rng: random.Random) -> None:
    users, dice = rng.sample([*USERS, "unknown"], rng.randint(0, 4)), rng.random()
    if dice < 0.6:
        world.set_window(users)
    elif dice < 0.85:
        world.pin(users[:2])
    else:
        world.unpin(users)


def _step(world: World, rng: random.Random, histories: dict[str, list[int]]) -> None:
    user, dice = rng.choice(USERS), rng.random()
    if dice < 0.14:
        _begin_batch(world, rng, histories)
    elif dice < 0.32:
        _begin_load(world, rng, histories)
    elif dice < 0.46:
        _begin_stores(world, rng)
    elif dice < 0.68 and world.jobs:
        rng.choice(world.jobs).advance(rng.randint(1, 4), rng)
    elif dice < 0.93 and world.jobs:
        _end(world, rng)
    elif dice < 0.95:
        pinned = [name for name in USERS if len(world.open_kinds(world.known.get(name))) > 1]
        world.invalidate(rng.choice(pinned) if pinned and rng.random() < 0.5 else user)
    elif dice < 0.952:
        world.grow_host(rng.randrange(3))
    elif dice < 0.98:
        _privilege(world, rng)
    world.look(user, histories[user])


# What every run must have met to mean anything, and what its sizes make it meet besides.
ALWAYS = {
    *("batch", "load", "store", "failed batch", "failed load", "failed store", "stale end"),
    *("short batch", "short load", "correction", "correction during store", "correction during load"),
    *("batch over load", "spoiled batch", "success before the load", "failed batch before its load"),
    *("invalidated over load", "pages planned", "unsaved eviction", "saved eviction"),
    *("eviction in the window", "eviction beside a window", "covered pins"),
}


@pytest.mark.parametrize(
    ("seed", "page_tokens", "gpu_pages", "host_pages", "policy", "met"),
    [
        (1, 4, 20, 30, "lru", set()),
        (2, 3, 12, 9, "sieve", {"short store"}),
        (3, 1, 25, 40, "s3fifo", set()),
        (9, 5, 6, 14, "arc", set()),
        (5, 4, 40, 8, "gdsf", {"short store"}),
        (6, 4, 60, 24, "wtinylfu", {"declined store"}),
        (7, 2, 14, 60, "lru", set()),
    ],
)
def test_fuzz(seed: int, page_tokens: int, gpu_pages: int, host_pages: int, policy: str, met: set[str]):
    rng = random.Random(seed)
    world = World(rng, page_tokens, gpu_pages, host_pages, policy)
    histories: dict[str, list[int]] = {user: [] for user in USERS}
    for _ in range(12000):
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
    stats = world.index.stats()
    assert stats.gpu.free == gpu_pages
    assert stats.host.free == stats.host.total > host_pages
