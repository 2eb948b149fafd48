"""Ways to move pages between host and GPU: the engine's mover, what it is compared with, and where pages lie."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve._core import PageAllocator  # noqa: E402
from mtserve.cache.index import Copy  # noqa: E402
from mtserve.kernels.cuda.driver import queue_call  # noqa: E402
from mtserve.transfer.arena import HostArena, grow_all  # noqa: E402
from mtserve.transfer.cuda_mover import CudaMover  # noqa: E402
from mtserve.transfer.mover import LOAD, STORE  # noqa: E402
from mtserve.transfer.pool import PageShape, allocate_pool  # noqa: E402

SHAPE = PageShape(layers=8, page_tokens=64, heads=4, head_dim=128, dtype=torch.bfloat16)
PAGES = 10_240  # of each tier; loads use the front half, stores the other
KINDS = (LOAD, STORE)
LONG = [4096] * 8  # tokens of the users moved together

Way = Callable[[str, list[Copy]], Callable[[], None]]
"""Starts copies of one kind; returns what waits for them."""


@triton.jit
def _gather(to, source, to_ids, source_ids, pages, page_words: tl.constexpr, words_together: tl.constexpr):
    """Copies whole pages of int64 words; a program takes every num_programs-th piece of `words_together`."""
    pieces: tl.constexpr = page_words // words_together
    for piece in range(tl.program_id(0), pages * pieces, tl.num_programs(0)):
        page = piece // pieces
        words = piece % pieces * words_together + tl.arange(0, words_together)
        into = tl.load(to_ids + page).to(tl.int64) * page_words
        out_of = tl.load(source_ids + page).to(tl.int64) * page_words
        tl.store(to + into + words, tl.load(source + out_of + words))


class _Pinned:
    """A pinned tensor's address as a kernel's pointer."""

    dtype = torch.int64

    def __init__(self, tensor: torch.Tensor) -> None:
        self._address = tensor.data_ptr()

    def data_ptr(self) -> int:
        return self._address


class Tiers:
    """Pool and arena with a mover, and the ways to be compared."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.pool = allocate_pool(SHAPE, PAGES, self.device, poison=False)
        self.arena = HostArena(SHAPE, PAGES, device=self.device, poison=False)
        began = time.perf_counter()
        grow_all(self.arena)
        self.pinning_s = time.perf_counter() - began
        self.mover = CudaMover(self.pool, self.arena.tensor, chunk_pages=self.arena.chunk_pages)
        self.streams = {kind: torch.cuda.Stream() for kind in KINDS}
        self._ids: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ways: dict[str, Way] = {
            "engine": self._engine,
            "one plain copy": self._plain,
            "a copy a page": self._by_page,
            "kernel, 4 blocks": lambda kind, copies: self._kernel(kind, copies, 4),
            "kernel, 16 blocks": lambda kind, copies: self._kernel(kind, copies, 16),
        }

    def _engine(self, kind: str, copies: list[Copy]) -> Callable[[], None]:
        self.mover.submit(kind, copies)

        def wait() -> None:
            self.mover.wait()
            for finished in self.mover.poll():
                assert finished.error is None

        return wait

    def _each(self, kind: str, pieces: list[tuple[int, int, int]]) -> Callable[[], None]:
        stream, size = self.streams[kind], SHAPE.bytes
        for inside, outside, count in pieces:
            gpu, host = self.pool.data_ptr() + inside * size, self.arena.tensor.data_ptr() + outside * size
            target, source = (gpu, host) if kind == LOAD else (host, gpu)
            ends = (ctypes.c_void_p(target), ctypes.c_void_p(source))
            queue_call("cuMemcpyAsync", *ends, ctypes.c_size_t(count * size), ctypes.c_void_p(stream.cuda_stream))
        return stream.synchronize

    def _plain(self, kind: str, copies: list[Copy]) -> Callable[[], None]:
        """As many pages, side by side, in the pieces that are pinned together."""
        first, step = (0 if kind == LOAD else PAGES // 2), self.arena.chunk_pages
        last = first + sum(len(copy.gpu_pages) for copy in copies)
        return self._each(kind, [(at, at, min(step, last - at)) for at in range(first, last, step)])

    def _by_page(self, kind: str, copies: list[Copy]) -> Callable[[], None]:
        pairs = [zip(copy.gpu_pages.tolist(), copy.host_pages.tolist(), strict=True) for copy in copies]
        return self._each(kind, [(inside, outside, 1) for each in pairs for inside, outside in each])

    def _kernel(self, kind: str, copies: list[Copy], blocks: int) -> Callable[[], None]:
        inside, outside = self.ids(copies)
        words = SHAPE.bytes // 8
        pool, arena = self.pool.view(torch.int64), _Pinned(self.arena.tensor)
        targets = (pool, arena, inside, outside) if kind == LOAD else (arena, pool, outside, inside)
        with torch.cuda.stream(self.streams[kind]):
            _gather[(blocks,)](*targets, len(inside), page_words=words, words_together=4096, num_warps=16)
        return self.streams[kind].synchronize

    def ids(self, copies: list[Copy]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of all copies in the pool and in the arena, int64 on the device."""
        if id(copies) not in self._ids:
            pages = ([copy.gpu_pages for copy in copies], [copy.host_pages for copy in copies])
            inside, outside = (torch.from_numpy(np.concatenate(each)).long().to(self.device) for each in pages)
            self._ids[id(copies)] = inside, outside
            torch.cuda.synchronize()
        return self._ids[id(copies)]

    def arena_on_device(self) -> torch.Tensor:
        """The arena's bytes as int64 [pages, words], copied in the pieces that are pinned together."""
        pieces = self.arena.tensor.view(torch.int64).view(PAGES, -1).split(self.arena.chunk_pages)
        return torch.cat([piece.to(self.device) for piece in pieces])


class Places:
    """Where users' pages lie: as the engine's allocators place them after much use, or every page apart.

    Loads and stores use different halves of both tiers.
    """

    def __init__(self, layout: str, seed: int) -> None:
        self._rng, self._apart = np.random.default_rng(seed), layout == "every page apart"
        self._free = {side: {kind: self._half(kind) for kind in KINDS} for side in ("gpu", "host")}
        self._allocators = {side: {kind: self._used() for kind in KINDS} for side in ("gpu", "host")}

    def _half(self, kind: str) -> list[int]:
        first = 0 if kind == LOAD else PAGES // 2
        return (self._rng.permutation(PAGES // 2) + first).tolist()

    def _used(self) -> PageAllocator:
        """An allocator that users of 1 to 313 pages have filled to 95% and been dropped from, over and over."""
        allocator, users = PageAllocator(PAGES // 2), []
        for _ in range(4000):
            wanted = int(np.exp(self._rng.uniform(0, np.log(313))))
            while users and allocator.free < wanted + PAGES // 40:
                for page in users.pop(int(self._rng.integers(len(users)))):
                    allocator.release(page)
            users.append(allocator.take(wanted))
        self._rng.shuffle(users)
        return self._emptied(allocator, users)

    def _emptied(self, allocator: PageAllocator, users: list[list[int]]) -> PageAllocator:
        """Users leave, in no order, until 3 in 4 pages are free."""
        while allocator.free < PAGES * 3 // 8 and users:
            for page in users.pop():
                allocator.release(page)
        return allocator

    def copies(self, kind: str, tokens: list[int]) -> list[Copy]:
        """One copy a user of so many tokens."""
        made = []
        for ticket, count in enumerate(tokens):
            inside, outside = self._of(kind, -(-count // SHAPE.page_tokens))
            made.append(Copy(ticket, f"u{ticket}", inside.astype(np.int32), outside.astype(np.int32), 0, count))
        return made

    def _of(self, kind: str, pages: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        first = 0 if kind == LOAD else PAGES // 2
        if self._apart:
            return tuple(np.array([self._free[side][kind].pop() for _ in range(pages)]) for side in ("gpu", "host"))  # type: ignore[return-value]
        return tuple(np.array(self._allocators[side][kind].take(pages)) + first for side in ("gpu", "host"))  # type: ignore[return-value]
