"""The host tier's memory: one bounded region, pinned chunk by chunk, in use from the first chunk on.

What becomes of it, in order:

    mapped     all of it, at once: addresses only, and one tensor over them
    populated  a chunk: the kernel backs it with memory, near the device where the machine has several nodes
    pinned     a chunk: one registration with CUDA, which the copy engine needs
    ready      every page of the chunks so far
"""

from __future__ import annotations

import atexit
import logging
import math
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mtserve._core import HostMemory
from mtserve.errors import CorruptState, MtserveError, ResourceExhausted
from mtserve.kernels.page_write.rounding import movable
from mtserve.transfer.numa import SYSFS, node_of, pci_id
from mtserve.transfer.pinning import CudaPinning, Pinning, memlock_limit
from mtserve.transfer.pool import Geometry, poison_of
from mtserve.units import format_bytes

log = logging.getLogger(__name__)

# Pinning as many takes 2.5 ms on an H200's host, in which other calls of CUDA wait.
CHUNK_BYTES = 64 * 2**20
PAGES_TOGETHER = 16  # a run of so many pages from a multiple of it is never cut by the end of a chunk


class HostArena:
    """Host pages [pages, *shape.sizes], usable as far as `ready`; `grow` makes more of them so.

    On a CUDA device they are pinned. On the CPU all are ready at once, and the system backs them as they are touched.
    `poison` fills pages with what makes NaN before they are ready. `threads` (1..64) is how many back a chunk with memory.

    `grow` and `close` belong to one thread at a time; `ready` and `tensor` may be read by all. Raises
    ResourceExhausted naming host_cache when the system will not map as much.
    """

    def __init__(
        self,
        shape: Geometry,
        pages: int,
        *,
        device: torch.device | None,
        poison: bool,
        threads: int = 2,
        pinning: Pinning | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        gpu = device if device is not None and device.type == "cuda" else None
        self.capacity = pages
        self.bytes = pages * shape.bytes
        self.chunk_pages = _chunk_pages(shape.bytes, chunk_bytes)
        self._page_bytes = shape.bytes
        self._poison, self._threads = poison, threads
        self._memory = HostMemory(max(1, self.bytes))
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)[: self.bytes]
        self.tensor = whole.view(shape.dtype).view(pages, *shape.sizes)
        self._pinned: list[int] = []  # addresses of chunks, rising
        self._closed = False
        self._pinning = CudaPinning(gpu) if pinning is None and gpu is not None else pinning
        if gpu is not None:
            self._settle_beside(gpu)
        if self._pinning is None:
            self._fill(0, pages)

    @property
    def ready(self) -> int:
        """Pages that can be used."""
        if self._closed:
            return 0
        return self.capacity if self._pinning is None else min(self.capacity, len(self._pinned) * self.chunk_pages)

    @property
    def ready_bytes(self) -> int:
        return self.ready * self._page_bytes

    def grow(self) -> int:
        """Make the next chunk ready; the pages added, 0 once all are. Takes tens of milliseconds and more.

        Raises ResourceExhausted naming host_cache, what failed and how far the arena had come. What was ready stays
        so, the chunk's memory is given back, and a later call tries again. CUDA is called through its driver: the
        failure leaves no error behind that torch would find.
        """
        assert not self._closed
        count = min(self.chunk_pages, self.capacity - self.ready)
        if self._pinning is None or count == 0:
            return 0
        offset, size = self.ready_bytes, _whole(count * self._page_bytes)
        address = self._memory.address + offset
        try:
            self._memory.populate(offset, size, self._threads)
            self._fill(self.ready, count)
            self._pinning.pin(address, size)
        except MtserveError as error:
            self._memory.discard(offset, size)
            raise self._exhausted(size, error) from None
        self._pinned.append(address)
        return count

    def close(self) -> None:
        """Unpin everything; no page is ready from then on. Once it has been called, calling it does nothing.

        No copy may be under way, here or on the device, and no growth. Every chunk is tried; the first error is
        raised at the end. The memory itself goes with the last tensor of it.
        """
        self._closed = True
        errors = []
        while self._pinned and self._pinning is not None:
            try:
                self._pinning.unpin(self._pinned.pop())
            except MtserveError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def check(self) -> None:
        """Raises CorruptState unless what is pinned are the first chunks, one behind the other."""
        step, pinned = self.chunk_pages * self._page_bytes, list(self._pinned)
        if pinned != [self._memory.address + chunk * step for chunk in range(len(pinned))]:
            raise CorruptState(f"{len(pinned)} chunks are pinned, not the first ones", field="host_cache")

    def _settle_beside(self, device: torch.device) -> None:
        node = node_of(SYSFS, pci_id(device))
        if node is not None and not self._memory.prefer_node(node):
            log.info("the system does not let host memory be taken beside %s, on NUMA node %d", device, node)

    def _fill(self, first: int, count: int) -> None:
        if self._poison:
            movable(self.tensor)[first : first + count].fill_(poison_of(self.tensor.dtype))

    def _exhausted(self, size: int, error: MtserveError) -> ResourceExhausted:
        reason = str(error).removeprefix("host_cache: ")
        return ResourceExhausted(
            f"{format_bytes(self.ready_bytes)} of {format_bytes(self.bytes)} are pinned, the next {format_bytes(size)} "
            f"cannot be: {reason} (ulimit -l: {memlock_limit()})",
            field="host_cache",
        )


class ArenaGrowth:
    """A thread that grows an arena until all of it is ready, a chunk fails, or it is stopped; starts at once.

    In that thread it calls `on_ready(pages added)` after each chunk, and `on_failed(error)` once if one fails.
    """

    def __init__(
        self, arena: HostArena, on_ready: Callable[[int], None], on_failed: Callable[[Exception], None]
    ) -> None:
        self._arena = arena
        self._on_ready, self._on_failed = on_ready, on_failed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="arena-growth", daemon=True)
        # Native code that comes back to an interpreter which is being taken down would abort the process.
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """End after the chunk under way, and wait for that. Not for the callbacks to call."""
        self._stopping.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        with _logged(self._arena, " in the background"):
            while not self._stopping.is_set():
                try:
                    added = self._arena.grow()
                except Exception as error:
                    self._on_failed(error)
                    return
                if not added:
                    return
                self._on_ready(added)


def grow_all(arena: HostArena, progress: Callable[[int, int], None] | None = None) -> None:
    """Make all pages ready before this returns; `progress(ready, capacity)` after each chunk.

    Raises ResourceExhausted as `HostArena.grow` does.
    """
    with _logged(arena, ""):
        while arena.grow():
            if progress is not None:
                progress(arena.ready, arena.capacity)


@contextmanager
def _logged(arena: HostArena, where: str) -> Iterator[None]:
    if arena.ready == arena.capacity:
        yield
        return
    log.info("pinning %s of host memory%s", format_bytes(arena.bytes), where)
    started = time.monotonic()
    try:
        yield
    finally:
        done = f"{format_bytes(arena.ready_bytes)} of {format_bytes(arena.bytes)}"
        log.info("pinned %s of host memory in %.1f s", done, time.monotonic() - started)


def _chunk_pages(page_bytes: int, chunk_bytes: int) -> int:
    """Pages of at least `chunk_bytes`: whole pages of the system, and whole runs of PAGES_TOGETHER."""
    step = math.lcm(math.lcm(page_bytes, mmap.PAGESIZE) // page_bytes, PAGES_TOGETHER)
    return -(-chunk_bytes // (step * page_bytes)) * step


def _whole(size: int) -> int:
    """`size` rounded up to whole pages of the system, which alone can be pinned."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
