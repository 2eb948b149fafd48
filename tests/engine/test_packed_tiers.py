"""Packed pages between the tiers: what the host has once been given stays as it is, however often it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import World
from restored_worlds import FORMATS, LAYERS, deep_world, on_the_host, push_off
from small_models import small_model

from mtserve.cache.index import Copy
from mtserve.transfer.mover import STORE, Mover, SyncMover

Make = Callable[..., World]
CYCLES = 30


class Watched(SyncMover):
    """Notes of each store whether the tokens that the host had already keep every byte of every layer."""

    def __init__(self, old: Mover, packed: Any, page_tokens: int) -> None:
        super().__init__(old.pool, old.arena)
        self.unpacker = old.unpacker
        self._packed, self._page_tokens = packed, page_tokens
        self.kept: list[bool] = []  # of stores into a page that was there

    def copy_now(self, kind: str, copy: Copy, first_layer: int = 0) -> None:
        known, page = copy.first_token % self._page_tokens, int(copy.host_pages[0])
        before = self._rows(page, known)
        super().copy_now(kind, copy, first_layer)
        if kind == STORE and known:
            self.kept.append(all(map(torch.equal, before, self._rows(page, known))))

    def _rows(self, page: int, tokens: int) -> list[torch.Tensor]:
        """Of the first `tokens` tokens of a page of the host, in each layer."""
        if self._packed is None:
            return [self.arena[page, :, :, :tokens].clone()]
        shape, pages = self._packed.shape, self.arena[page : page + 1].flatten(1)
        return [
            part[:, :, :tokens].clone()
            for layer in range(shape.layers)
            for part in (shape.payload(pages, layer), shape.peaks(pages, layer))
        ]


@pytest.mark.parametrize("host_format", FORMATS)
def test_states_that_come_and_go_for_long_do_not_change(world: Make, host_format: str) -> None:
    """Every cycle a page's last tokens are appended to, saved, pushed off and loaded again."""
    model = small_model(layers=LAYERS, d=32, max_history=60, max_realtime=50)
    w = deep_world(world, model, gpu_pages=26, host_pages=400, host_format=host_format, restore="load")
    mover = Watched(w.tiers.mover, w.engine._core.memory.packed, 4)  # type: ignore[union-attr]
    w.use_mover(mover)
    w.put("a", 14)
    w.score("a")
    errors = []
    for cycle in range(CYCLES):
        w.append("a", 1)
        pending = w.submit("a", 8)
        w.run()
        result = pending.verify()
        errors.append(float(np.abs(result.logits - pending.expected()).max()))
        assert (result.encoded_tokens, result.host_tokens > 0) == (1, cycle > 0)
        assert w.held("a")[1] == result.prefix_tokens  # the last page too, however little is in it
        push_off(w, "a")
    assert len(mover.kept) > CYCLES // 2 and all(mover.kept)
    assert max(errors[-10:]) <= 3 * max(errors[:10])
    w.assert_empty()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_of_a_split_only_the_layers_that_came_are_unpacked(world: Make, layer: int) -> None:
    """The others have states that no format has touched."""
    w = deep_world(world, host_format="x4")
    on_the_host(w, "a")
    calls: list[tuple[int, int]] = []
    unpacker = w.tiers.mover.unpacker
    unpack = unpacker.unpack

    def noted(pages: Any, first: int, last: int, *rest: Any, **options: Any) -> None:
        calls.append((first, last))
        unpack(pages, first, last, *rest, **options)

    unpacker.unpack = noted
    w.restore_at(layer)
    w.score("a")
    assert calls == [(layer, LAYERS)]
