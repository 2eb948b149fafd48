"""Loading or encoding again: by what the link and the device are expected to take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_world import DelayedMover, World

Make = Callable[..., World]
TOKEN_S = 0.01


def on_the_host(world: Make, load_s: float, restore: str = "auto") -> tuple[World, DelayedMover]:
    """User a, 23 tokens, of which the device has 4; every load is expected to take `load_s`, a token 0.01 s."""
    w = world(gpu_pages=12, host_pages=40, restore=restore)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    assert w.held("a") == (4, 23)
    mover = w.delay_copies()
    mover.load_seconds = load_s
    w.pace(TOKEN_S)
    return w, mover


# 19 tokens are missing and 3 candidates asked for: 0.22 s of the device.
@pytest.mark.parametrize(("load_s", "loads"), [(0.21, 1), (0.23, 0)])
def test_a_lone_prefix_takes_the_sooner_way(world: Make, load_s: float, loads: int) -> None:
    w, mover = on_the_host(world, load_s)
    pending = w.submit("a")
    w.run()
    mover.release_all()
    w.run()
    result = pending.verify()
    assert (w.value("loads_total"), w.value("loads_declined_total")) == (loads, 1 - loads)
    assert (result.host_tokens, result.encoded_tokens) == ((19, 0) if loads else (0, 19))


def test_the_link_brings_what_the_device_has_no_time_for(world: Make) -> None:
    """User c is to be encoded in any case: until then the link has brought user a."""
    w, mover = on_the_host(world, 0.25)
    w.put("c", 21)
    pending = [w.submit("a"), w.submit("c")]
    for _ in range(3):
        w.run()
        mover.release_all()
    w.run()
    assert pending[0].verify().host_tokens == 19
    assert pending[1].verify().encoded_tokens == 23
    assert w.value("loads_declined_total") == 0


def test_what_must_be_loaded_is_loaded_however_long_it_takes(world: Make) -> None:
    w, mover = on_the_host(world, 1e6, restore="load")
    pending = w.submit("a")
    w.run()
    mover.release_all()
    w.run()
    assert pending.verify().host_tokens == 19


def test_an_unknown_pace_loads(world: Make) -> None:
    w, mover = on_the_host(world, 1e6)
    w.pace(0.0)
    pending = w.submit("a")
    w.run()
    mover.release_all()
    w.run()
    assert pending.verify().host_tokens == 19
