"""Worlds whose batches decide how their users' states come back, and users whose states only the host has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_world import DelayedMover, Pending, World
from small_models import small_model

from mtserve.errors import TransferFailed
from mtserve.model.ranking import RankingModel
from mtserve.restore.costs import costs_for_cpu

Make = Callable[..., World]
LAYERS = 4
FORMATS = {"kv": 1e-5, "kv8": 0.02, "x8": 0.02, "x4": 0.3}  # with the tolerance of a score
FP8_TOLERANCE = 0.02  # beside a recompute that rounds too: numbers half way between two are rounded either way
COUNT, PREFIX = 19, 21  # a user's behaviours, of which the last 9 are R, and tokens
SPLITS = range(1, LAYERS)


def deep_world(world: Make, model: RankingModel | None = None, **config: Any) -> World:
    model = small_model(layers=LAYERS, d=32) if model is None else model
    sizes = {"gpu_pages": 14, "host_pages": 360 // config.get("page_tokens", 4), "costs": costs_for_cpu(), **config}
    tolerance = FP8_TOLERANCE if config.get("gpu_format") == "fp8" else FORMATS[config.get("host_format", "kv")]
    return world(model, tolerance=tolerance, **sizes)


def on_the_host(w: World, *users: str, count: int = COUNT) -> None:
    """Each user's states on the host, and at most some on the device."""
    for user in users:
        w.put(user, count)
        w.score(user)
    push_off(w, *users)


def push_off(w: World, *users: str) -> None:
    """Score others until the device lacks some of each of these users' states."""
    for filler in range(4):
        if any(gpu >= host for gpu, host in map(w.held, users)):
            w.evict_from_gpu((f"filler {filler}",))
    assert all(gpu < host for gpu, host in map(w.held, users))


class SomeFail:
    """Fails the copies whose turn is in `turns`, counted from 0 over those of `kind` since the last `begin`."""

    def __init__(self) -> None:
        self.kind, self.turns, self.seen = "load", frozenset[int](), 0

    def begin(self, *turns: int) -> None:
        self.turns, self.seen = frozenset(turns), 0

    def __call__(self, kind: str) -> None:
        if kind == self.kind:
            self.seen += 1
            if self.seen - 1 in self.turns:
                raise TransferFailed(f"{kind}: switched off")


class Crash:
    """Raises at one launch of a kernel, counted from 0."""

    def __init__(self, w: World, launch: int, op: str = "attention") -> None:
        self.left = launch
        w.hook(op, self)

    def __call__(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise RuntimeError("the kernel fell over")


def settle(w: World, mover: DelayedMover) -> None:
    """Let every copy end and every request be answered."""
    for _ in range(100):
        mover.release_all()
        if not w.step() and not w.engine._core.busy():
            return
    raise AssertionError("the engine is still busy")


def tokens(pending: Pending) -> tuple[int, int, int]:
    """Where a verified score found its prefix: device, host, neither."""
    result = pending.verify()
    return result.gpu_tokens, result.host_tokens, result.encoded_tokens


def split_under_way(
    world: Make, layer: int, *, copied: bool, users: str = "ab", **config: Any
) -> tuple[World, DelayedMover, list[Pending]]:
    """A batch of `users`, each of PREFIX tokens, that loads the layers from `layer` on, launched and not run yet.

    `copied`: its loads have ended, and the loop has seen it.
    """
    w = deep_world(world, **config)
    on_the_host(w, *users)
    w.overlap(late=True)
    mover = w.delay_copies()
    w.restore_at(layer)
    pending = [w.submit(user) for user in users]
    w.step()
    assert [kind for kind, *_ in mover.jobs] == ["load"] * len(users)
    assert set(mover.first_layers.values()) == {layer}
    pages = sum(len(copy.gpu_pages) for _, copy, _ in mover.jobs)
    assert w.value("load_bytes_in_flight") == pages * mover.pool[:1].nbytes * (LAYERS - layer) / LAYERS
    if copied:
        mover.release_all()
        w.tiers.finish()
        w.engine.check()
    return w, mover, pending
