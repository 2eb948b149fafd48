"""Faults on demand: what is asked for is what happens, again and again; a slow copy is told late and blocks nobody."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtserve.cache.index import Copy
from mtserve.errors import InvalidArgument, TransferFailed
from mtserve.transfer.chaos import Chaos, ChaosPinning
from mtserve.transfer.mover import LOAD, STORE, Mover, SyncMover
from mtserve.transfer.slow_mover import SlowMover

COPIES = 4000


def fates(chaos: Chaos, kind: str, count: int = COPIES) -> list[bool]:
    """Whether each of the next copies fails."""

    def fails() -> bool:
        try:
            chaos(kind)
        except TransferFailed:
            return True
        return False

    return [fails() for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fail=0.05,slow=0.02:20ms,seed=7", (0.05, 0.02, 0.02, 0, 7)),
        ("fail=1", (1, 0, 0, 0, 0)),
        ("slow=0.5:1.5s", (0, 0.5, 1.5, 0, 0)),
        (" seed=3, slow=1:60s , fail=0", (0, 1, 60, 0, 3)),
        ("pin=0.25", (0, 0, 0, 0.25, 0)),
        ("fail=0.05,slow=0.02:20ms,pin=0.1,seed=7", (0.05, 0.02, 0.02, 0.1, 7)),
    ],
)
def test_what_is_written_is_what_is_meant(text: str, expected: tuple[float, float, float, float, int]) -> None:
    chaos = Chaos.parse(text)
    assert (chaos.fail, chaos.slow, chaos.slow_s, chaos.pin, chaos.seed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not fail=SHARE, slow=SHARE:TIME, pin=SHARE or seed=N"),
        ("fail", "'fail' is not fail="),
        ("fail=0.1,", "'' is not fail="),
        ("speed=2", "'speed=2' is not fail="),
        ("fail=0.1,fail=0.2", "fail is given twice"),
        ("seed=7", "'seed=7' has none of fail, slow and pin"),
        ("pin", "'pin' is not fail="),
        ("pin=0.1,pin=0.1", "pin is given twice"),
        ("pin=never", "pin 'never' is not a number"),
        ("pin=1.01", "pin 1.01 is outside 0 to 1"),
        ("pin=-0.1", "pin -0.1 is outside 0 to 1"),
        ("pin=nan", "pin nan is outside 0 to 1"),
        ("fail=often", "fail 'often' is not a number"),
        ("fail=1.01", "fail 1.01 is outside 0 to 1"),
        ("fail=-0.1", "fail -0.1 is outside 0 to 1"),
        ("fail=nan", "fail nan is outside 0 to 1"),
        ("slow=0.1", "the time of slow '' is not such as 20ms"),
        ("slow=0.1:20", "the time of slow '20' is not such as 20ms"),
        ("slow=0.1:ms", "the time of slow '' is not a number"),
        ("slow=2:20ms", "slow 2 is outside 0 to 1"),
        ("slow=0.1:61s", "the time of slow 61 is outside 0 to 60 s"),
        ("slow=0.1:-1ms", "the time of slow -0.001 is outside 0 to 60 s"),
        ("fail=0.1,seed=1.5", "seed '1.5' is not an integer"),
        ("fail=0.1,seed=-1", "seed -1 is outside 0 to 2147483647"),
        ("fail=0.1,seed=2147483648", "is outside 0 to 2147483647"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Chaos.parse(text)
    assert caught.value.field == "chaos"
    assert message in str(caught.value)


def test_seeded_runs_repeat_whatever_the_order_of_loads_and_stores() -> None:
    text = "fail=0.3,slow=0.4:5ms,seed=11"
    first, second = Chaos.parse(text), Chaos.parse(text)
    loads, stores = fates(first, LOAD), fates(first, STORE)
    delays = [first.delay(LOAD) for _ in range(COPIES)]
    assert [second.delay(LOAD) for _ in range(COPIES)] == delays
    assert (fates(second, STORE), fates(second, LOAD)) == (stores, loads)
    assert loads != stores
    assert fates(Chaos.parse("fail=0.3,seed=12"), LOAD) != loads


def test_a_failed_copy_says_that_it_was_meant() -> None:
    with pytest.raises(TransferFailed, match="chaos: load: failed on purpose"):
        Chaos.parse("fail=1")(LOAD)


def test_shares_are_met() -> None:
    chaos = Chaos.parse("fail=0.3,slow=0.1:5ms,seed=2")
    for kind in (LOAD, STORE):
        deviation = 5 * math.sqrt(0.3 * 0.7 / COPIES)
        assert np.mean(fates(chaos, kind)) == pytest.approx(0.3, abs=deviation)
        delays = [chaos.delay(kind) for _ in range(COPIES)]
        assert set(delays) == {0.0, 0.005}
        assert np.mean(np.array(delays) > 0) == pytest.approx(0.1, abs=deviation)
    assert not any(fates(Chaos.parse("fail=0"), LOAD, 100))
    assert all(fates(Chaos.parse("fail=1"), LOAD, 100))


# Pinning


class Pins:
    """A pinning that notes what it is asked to do."""

    def __init__(self) -> None:
        self.pinned: list[tuple[int, int]] = []
        self.unpinned: list[int] = []

    def pin(self, address: int, size: int) -> None:
        self.pinned.append((address, size))

    def unpin(self, address: int) -> None:
        self.unpinned.append(address)


def pin_fates(pinning: ChaosPinning, count: int = COPIES) -> list[bool]:
    """Whether each of the next chunks fails."""

    def fails(address: int) -> bool:
        try:
            pinning.pin(address, 10)
        except TransferFailed:
            return True
        return False

    return [fails(address) for address in range(count)]


def test_a_share_of_the_pins_fails_before_anything_is_pinned() -> None:
    inner = Pins()
    chaos = Chaos.parse("pin=0.3,seed=4")
    failed = pin_fates(ChaosPinning(chaos, inner))
    assert np.mean(failed) == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / COPIES))
    assert inner.pinned == [(address, 10) for address, each in enumerate(failed) if not each]
    assert pin_fates(ChaosPinning(Chaos.parse("pin=0.3,fail=0.5,seed=4"), None)) == failed
    assert pin_fates(ChaosPinning(Chaos.parse("pin=0.3,seed=5"), None)) != failed
    assert not any(fates(chaos, LOAD, 100))


def test_pins_are_undone_without_fail() -> None:
    inner = Pins()
    pinning = ChaosPinning(Chaos.parse("pin=1"), inner)
    with pytest.raises(TransferFailed, match=r"chaos: pinning failed on purpose \(pin=1\)"):
        pinning.pin(1, 10)
    assert inner.pinned == []
    for address in range(50):
        pinning.unpin(address)
    assert inner.unpinned == list(range(50))
    ChaosPinning(Chaos.parse("pin=1"), None).unpin(3)  # where none is needed there is nothing to undo


# Slow copies


class Link:
    """A slow mover of four pages whose n-th copy is late by the n-th of `delays`."""

    def __init__(self, *delays: float, fail: bool = False) -> None:
        self.now = 100.0
        self.delays = list(delays)
        tiers = torch.zeros(4, 1, 2, 1, 1, 1), torch.ones(4, 1, 2, 1, 1, 1)
        inner = SyncMover(*tiers, Chaos(fail=1) if fail else None)
        self.mover = SlowMover(inner, lambda kind: self.delays.pop(0), lambda: self.now)

    def submit(self, kind: str, *tickets: int) -> None:
        page = np.zeros(1, dtype=np.int32)
        self.mover.submit(kind, [Copy(ticket, "", page, page, 0, 0) for ticket in tickets])

    def poll(self) -> list[int]:
        return [finished.ticket for finished in self.mover.poll()]


def test_a_slow_copy_is_told_when_its_time_has_passed() -> None:
    link = Link(0.2, 0.0, 0.1)
    link.submit(LOAD, 1, 2)
    link.submit(STORE, 3)
    assert link.mover.pending() == 3
    assert link.poll() == [2]
    link.now += 0.099
    assert (link.poll(), link.mover.pending()) == ([], 2)
    link.now += 0.002
    assert link.poll() == [3]
    link.now += 1
    assert (link.poll(), link.mover.pending(), link.poll()) == ([1], 0, [])


def test_slow_copies_end_in_the_order_of_their_times() -> None:
    link = Link(0.3, 0.1, 0.2)
    link.submit(LOAD, 1, 2, 3)
    assert link.poll() == []
    link.now += 1
    assert link.poll() == [2, 3, 1]


def test_tickets_of_loads_and_stores_are_told_apart() -> None:
    link = Link(0.3, 0.0)
    link.submit(LOAD, 1)
    link.submit(STORE, 1)
    assert [finished.kind for finished in link.mover.poll()] == [STORE]


def test_a_slow_copy_may_fail_too() -> None:
    link = Link(0.3, fail=True)
    link.submit(LOAD, 1)
    assert link.mover.poll() == []
    link.now += 1
    (finished,) = link.mover.poll()
    assert isinstance(finished.error, TransferFailed)


def test_whoever_waits_for_all_waits_for_no_pretended_slowness() -> None:
    link = Link(0.3, 0.0, 50.0, 40.0)
    link.submit(LOAD, 1, 2)
    assert link.poll() == [2]
    link.submit(STORE, 3, 4)
    link.mover.wait()
    assert sorted(link.poll()) == [1, 3, 4]
    assert link.mover.pending() == 0


class NearMover(SyncMover):
    """Tells every load as near."""

    def near(self, ticket: int) -> bool:
        return True


def test_a_late_load_is_not_near_however_much_of_it_is_there() -> None:
    link = Link(0.3, 0.0, 0.3)
    inner: Mover = NearMover(link.mover.pool, link.mover.arena)
    link.mover = SlowMover(inner, lambda kind: link.delays.pop(0), lambda: link.now)
    link.submit(LOAD, 1, 2)
    link.submit(STORE, 2)  # a slow store of the same ticket says nothing of the load
    assert not link.mover.near(1)
    assert link.mover.near(2)
