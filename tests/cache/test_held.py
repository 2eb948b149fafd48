"""Held entries of the replacement policies: never chosen, soon out of the way, and else like others."""

from __future__ import annotations

import random

import pytest

from mtserve._core import _Policy, policy_names
from mtserve.errors import InvalidArgument

NAMES = sorted(policy_names())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_who_is_held_is_passed_over_like_who_is_pinned(name: str, seed: int):
    """Two policies with one life: in one of them some are held, in the other they are pinned in every search."""
    rng = random.Random(seed)
    held, pinned = (_Policy(name, 60) for _ in range(2))
    both, special, searches = (held, pinned), set(), 0
    for step in range(3000):
        slot = rng.randrange(40)
        if not held.contains(slot):
            size = rng.randint(1, 6)
            while held.pages + size > 60 and (victim := held.victim()) is not None:
                assert victim == pinned.victim(sorted(special))
                assert victim not in special
                searches += 1
                for each in both:
                    each.remove(victim, evicted=True)
            assert held.pages + size <= 60 or pinned.victim(sorted(special)) is None
            for each in both:
                each.insert(slot, 1000 + slot, size)
            if rng.random() < 0.2:
                held.hold(slot)
                special.add(slot)
        elif rng.random() < 0.1:
            for each in both:
                each.remove(slot, evicted=False)
            special.discard(slot)
        elif rng.random() < 0.5:
            size = rng.randint(1, 6)
            for each in both:
                each.resize(slot, size)
        else:
            for each in both:
                each.access(slot) if step % 3 else each.refresh(slot)
        for each in both:
            each.check()
        assert (len(held), held.pages) == (len(pinned), pinned.pages)
    assert searches > 100


@pytest.mark.parametrize("name", NAMES)
def test_a_search_meets_held_entries_once(name: str):
    policy = _Policy(name, 3000)
    for slot in range(3000):
        policy.insert(slot, slot, 1)
    for slot in range(2900):
        policy.hold(slot)
    for _ in range(4):
        policy.victim()
        policy.check()
    before = policy.looks
    for _ in range(50):
        victim = policy.victim()
        assert victim is not None
        assert victim >= 2900
        policy.remove(victim, evicted=True)
    assert policy.looks - before < 50 * 8


@pytest.mark.parametrize("name", NAMES)
def test_who_is_released_can_be_chosen_again(name: str):
    policy = _Policy(name, 8)
    for slot in range(8):
        policy.insert(slot, slot, 1)
        policy.hold(slot)
    assert policy.victim() is None
    assert (len(policy), policy.pages) == (8, 8)
    policy.resize(3, 2)
    assert policy.victim() is None
    policy.access(4)
    policy.check()
    for slot in range(8):
        policy.release(slot)
        policy.check()
    chosen = []
    while (victim := policy.victim()) is not None:
        chosen.append(victim)
        policy.remove(victim, evicted=True)
        policy.check()
    assert sorted(chosen) == list(range(8))
    if name in ("lru", "gdsf", "arc"):
        assert chosen[-1] == 4  # alone used while it was held


def test_a_released_entry_is_the_oldest_unless_it_was_used():
    policy = _Policy("lru", 8)
    for slot in range(4):
        policy.insert(slot, slot, 1)
    policy.hold(0)
    policy.hold(1)
    policy.hold(2)
    assert policy.victim() == 3  # 0, 1 and 2 were met
    policy.access(1)
    policy.release(2)
    policy.release(1)
    assert [policy.victim(), policy.victim([2])] == [2, 3]
    policy.release(0)
    assert policy.victim() == 0


def test_only_listed_entries_are_held_and_only_held_ones_released():
    policy = _Policy("lru", 8)
    policy.insert(1, 1, 1)
    for call in (policy.hold, policy.release):
        with pytest.raises(InvalidArgument, match="not listed"):
            call(2)
    with pytest.raises(InvalidArgument, match="not held"):
        policy.release(1)
    policy.hold(1)
    policy.remove(1, evicted=False)
    policy.insert(1, 1, 1)
    assert policy.victim() == 1


@pytest.mark.parametrize("name", NAMES)
def test_who_may_enter_a_full_tier(name: str):
    policy = _Policy(name, 16)
    policy.insert(1, 1, 1)
    policy.access(1)
    newcomer = [policy.admits(2, 1, victim=1)]
    for _ in range(2):
        policy.decline(2, 1)
        newcomer.append(policy.admits(2, 1, victim=1))
    assert newcomer == ([False, False, True] if name == "wtinylfu" else [True] * 3)
    policy.check()
