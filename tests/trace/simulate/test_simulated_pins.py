from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from demands import demand

from mtserve.errors import InvalidArgument, NotFound
from mtserve.trace.simulate import pins
from mtserve.trace.simulate.pins import Pins, read_user_ids
from mtserve.trace.simulate.run import simulate
from mtserve.trace.simulate.sampling import only


def test_a_user_a_line_each_once(tmp_path: Path) -> None:
    text = "anna\nbjörn \r\nanna\n{}".format("c" * 256)
    plain, packed = tmp_path / "users.txt", tmp_path / "users.gz"
    plain.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    told: list[tuple[int, int]] = []
    for path in (plain, packed):
        assert read_user_ids(path, lambda done, total: told.append((done, total))) == ["anna", "björn ", "c" * 256]
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "2: empty line"),
        (b"a\n\xff\n", "2: not UTF-8"),
        (b"a" * 257, "1: longer than 256 bytes"),
        (b"", "names no user"),
        (b"a\nb\nc\nd\n", "names more than 3 users"),
    ],
)
def test_what_is_no_list_of_users(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "MAX_PINS", 3)
    path = tmp_path / "users.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        read_user_ids(path)
    with pytest.raises(NotFound):
        read_user_ids(tmp_path / "absent.txt")


def test_unknown_users_are_counted() -> None:
    found = Pins.of(["a", "b", "c"], ["c", "x", "a", "x"], 0.25)
    assert found.numbers.dtype == np.int32
    assert (found.numbers.tolist(), found.unknown, found.budget) == ([0, 2], 1, 0.25)


def test_pins_go_with_their_users() -> None:
    asked = replace(demand([0, 1, 2, 3, 1], [8] * 5), pins=Pins(np.array([True, False, False, True]), 0.5))
    sample = only(asked, np.array([1, 3], dtype=np.int32))
    assert sample.pins is not None
    assert (sample.pins.users.tolist(), sample.pins.budget) == ([False, True], 0.5)
    assert asked.first(2).pins is asked.pins
    assert asked.working_set_pages(4, np.array([True, False, False, False])) == 2
    with pytest.raises(InvalidArgument, match=r"pins: expected bool \[4\], got \[2\]"):
        replace(asked, pins=sample.pins)


def test_a_pinned_user_stays_when_others_come() -> None:
    """A tier for two users; the pinned one is the least recently used of three."""
    asked = demand([0, 1, 2, 0], [8] * 4)
    for users, found in (([True, False, False], 8), ([False] * 3, 0)):
        pinned = replace(asked, pins=Pins(np.array(users), 0.5))
        run = simulate(pinned, policy="lru", gpu_pages=4, host_pages=0, page_tokens=4)
        assert run.gpu_tokens.tolist() == [0, 0, 0, found]
        assert run.counters.gpu.pinned_users == users.count(True)
    with pytest.raises(InvalidArgument, match="pin_budget"):
        simulate(
            replace(asked, pins=Pins(np.array([True] * 3), 0.6)), policy="lru", gpu_pages=4, host_pages=0, page_tokens=4
        )
