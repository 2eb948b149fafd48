"""The memory of both tiers, from its allocation to its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from mtserve.config import EngineConfig
from mtserve.engine import setup
from mtserve.engine.tiers.footprint import Footprint, link_shape
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.host_format.shape import FormatShape
from mtserve.transfer.arena import ArenaGrowth, HostArena, grow_all
from mtserve.transfer.chaos import Chaos, ChaosPinning
from mtserve.transfer.pinning import CudaPinning, Pinning
from mtserve.transfer.pool import PageShape, allocate_pool

log = logging.getLogger(__name__)


class Memory:
    """The device's pool of states, of their packed twins where the host keeps such, and the host arena.

    `pool` [pages, *PageShape.sizes]; `packed` its twins or None; `link`: that of the two which crosses the link, in the
    shape that it has in the arena. The arena is pinned on CUDA, the rest of it by `grow` where that may be later.

    Raises ResourceExhausted when either does not fit, or when the first chunk of the arena (all of it, unless
    `background`) cannot be pinned: then nothing stays allocated.
    """

    def __init__(
        self,
        config: EngineConfig,
        shape: PageShape,
        packed: FormatShape | None,
        device: torch.device,
        chaos: Chaos | None,
        *,
        background: bool,
    ) -> None:
        """`packed`: the twins' shape; None where the states themselves cross the link."""
        poison = config.poison_pages
        pinning: Pinning | None = CudaPinning(device) if device.type == "cuda" else None
        if chaos is not None and chaos.pin:
            pinning = ChaosPinning(chaos, pinning)
        self.footprint, linked = Footprint.of(shape, packed), link_shape(shape, packed)
        pages = setup.arena_pages(config, self.footprint.host)
        self.arena = HostArena(linked, pages, device=device, poison=poison, pinning=pinning)
        pages = setup.device_pages(config, self.footprint.gpu, device)
        self.pool = allocate_pool(shape, pages, device, poison=poison)
        self.link, self.packed = self.pool, None
        if packed is not None:
            self.link = allocate_pool(linked, pages, device, poison=poison)
            self.packed = PackedPages(packed, self.link.flatten(1))
        self.error: Exception | None = None
        self._closed = False
        self._growth: ArenaGrowth | None = None
        try:
            if background and config.host_pinning == "background":
                self.arena.grow()
            else:
                grow_all(self.arena)
        except Exception:
            self.arena.close()
            raise

    def grow(self, on_ready: Callable[[int], None]) -> None:
        """Pin what is left of the arena in the background; `on_ready(pages)` is called there after each chunk.

        Where that fails the arena stays as large as it is, and `facts` say why.
        """
        if self.arena.ready < self.arena.capacity:
            self._growth = ArenaGrowth(self.arena, on_ready, self._failed)

    def _failed(self, error: Exception) -> None:
        self.error = error
        log.error("the host tier stays smaller than it was asked to be: %s", error)

    def facts(self) -> dict[str, Any]:
        """`ready_bytes` of `bytes` of the arena can be used; `error` says why it stopped growing, where it did."""
        return {
            "bytes": self.arena.bytes,
            "ready_bytes": self.arena.ready_bytes,
            "error": None if self.error is None else str(self.error),
        }

    def stop(self) -> None:
        """End the growth after the chunk under way."""
        if self._growth is not None:
            self._growth.stop()

    def close(self) -> None:
        """Unpin the arena. No copy may be under way, no growth either."""
        self.arena.close()
        self._closed = True

    def check(self, host_pages: int) -> None:
        """Raises CorruptState when the arena is inconsistent; `host_pages` in use are all ready until it is closed."""
        self.arena.check()
        assert self._closed or host_pages <= self.arena.ready
