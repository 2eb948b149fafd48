"""Batches that decide for themselves how their users' states come back: loaded, encoded, or some layers each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_world import World
from small_models import small_model

from mtserve.restore.costs import costs_for_cpu

Make = Callable[..., World]
LAYERS = 4
FORMATS = {"kv": 1e-5, "kv8": 0.02, "x8": 0.02, "x4": 0.3}


def deep_world(world: Make, **config: object) -> World:
    model = small_model(layers=LAYERS, d=32)
    return world(model=model, gpu_pages=14, host_pages=60, costs=costs_for_cpu(), **config)


def on_the_host(w: World, *users: str, count: int = 21) -> None:
    """Each user's states on the host, and at most some on the device."""
    for user in users:
        w.put(user, count)
        w.score(user)
        w.run()
    w.evict_from_gpu()


@pytest.mark.parametrize("host_format", FORMATS)
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_every_split_scores_as_a_full_recompute(world: Make, layer: int, host_format: str) -> None:
    w = deep_world(world, host_format=host_format, tolerance=FORMATS[host_format])
    on_the_host(w, "a", "b")
    held = {user: w.held(user) for user in "ab"}
    assert all(gpu < host for gpu, host in held.values())
    w.restore_at(layer)
    w.append("a", 5)
    pending = [w.submit("a"), w.submit("b"), w.submit("a", 2)]
    w.run()
    results = [each.verify() for each in pending]
    gpu, host = held["b"]
    assert (results[1].gpu_tokens, results[1].host_tokens) == (gpu, host - gpu if layer < LAYERS else 0)
    way = "load" if layer == 0 else "recompute" if layer == LAYERS else "split"
    assert w.value("restored_batches_total", way) == 1
    # What was restored serves like any other states, and more is added behind.
    w.append("a", 3)
    assert w.score("a").encoded_tokens == 3
