"""The host arena: chunk by chunk, each pinned once and apart, and nothing lost or left behind where one fails."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtserve._core import HostMemory
from mtserve.errors import CorruptState, FailedPrecondition, InvalidArgument, ResourceExhausted
from mtserve.transfer.arena import CHUNK_BYTES, ArenaGrowth, HostArena, grow_all
from mtserve.transfer.numa import node_of
from mtserve.transfer.pinning import CudaPinning, memlock_limit
from mtserve.transfer.pool import PageShape

MIB = 2**20
ODD = PageShape(layers=3, page_tokens=5, heads=1, head_dim=8, dtype=torch.float32)  # 960 bytes
EVEN = PageShape(layers=2, page_tokens=64, heads=4, head_dim=128, dtype=torch.bfloat16)  # 256 KiB


class FakePinning:
    """Keeps the ranges pinned, as CUDA would; fails where it is told to."""

    def __init__(self, failing_pins: tuple[int, ...] = (), failing_unpins: tuple[int, ...] = ()) -> None:
        self.ranges: list[tuple[int, int]] = []  # first address, last + 1
        self.unpinned: list[int] = []
        self._pins, self._unpins = 0, 0
        self._failing_pins, self._failing_unpins = failing_pins, failing_unpins

    def pin(self, address: int, size: int) -> None:
        self._pins += 1
        if self._pins - 1 in self._failing_pins:
            raise FailedPrecondition("error 2: out of memory", field="cuMemHostRegister_v2")
        assert address % mmap.PAGESIZE == 0 and size % mmap.PAGESIZE == 0 and size > 0
        assert all(address + size <= first or last <= address for first, last in self.ranges), "pinned already"
        self.ranges.append((address, address + size))

    def unpin(self, address: int) -> None:
        self._unpins += 1
        self.unpinned.append(address)
        if self._unpins - 1 in self._failing_unpins:
            raise FailedPrecondition(f"error {700 + self._unpins}", field="cuMemHostUnregister")
        (found,) = (each for each in self.ranges if each[0] == address)
        self.ranges.remove(found)


def _arena(pinning: FakePinning | None, pages: int = 40, shape: PageShape = EVEN, chunk: int = 4 * MIB) -> HostArena:
    """Of 40 pages, chunks are of 16, 16 and 8."""
    return HostArena(shape, pages, device=None, poison=True, pinning=pinning, chunk_bytes=chunk)


def _resident(memory: HostMemory) -> int:
    """Bytes of the mapping that the system has backed."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(memory.address // mmap.PAGESIZE * 8)
        entries = np.frombuffer(file.read(memory.bytes // mmap.PAGESIZE * 8), dtype=np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63))) * mmap.PAGESIZE  # bit 63: present


@given(
    tokens=st.integers(1, 9),
    head_dim=st.integers(1, 20),
    layers=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    pages=st.integers(0, 300),
    chunk=st.integers(1, 70_000),
)
def test_every_page_lies_in_exactly_one_pinned_range(
    tokens: int, head_dim: int, layers: int, dtype: torch.dtype, pages: int, chunk: int
) -> None:
    shape = PageShape(layers, tokens, 1, head_dim, dtype)
    pinning = FakePinning()
    arena = HostArena(shape, pages, device=None, poison=False, pinning=pinning, chunk_bytes=chunk)
    first = arena.tensor.data_ptr()
    assert arena.chunk_pages % 16 == 0
    assert arena.chunk_pages * shape.bytes >= chunk
    while added := arena.grow():
        arena.check()
        assert arena.ready == pages or added == arena.chunk_pages
        for page in range(arena.ready):
            start, end = first + page * shape.bytes, first + (page + 1) * shape.bytes
            assert [low <= start and end <= high for low, high in pinning.ranges].count(True) == 1
    assert arena.ready == arena.capacity == pages
    end = first + -(-pages * shape.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    assert all(first <= low and high <= end for low, high in pinning.ranges)
    for low, high in pinning.ranges:  # a copy that stays within a chunk stays within a range
        assert low == first + (low - first) // shape.bytes // arena.chunk_pages * arena.chunk_pages * shape.bytes
        assert high - low <= arena.chunk_pages * shape.bytes + mmap.PAGESIZE
    arena.close()
    assert pinning.ranges == []


def test_chunks_by_hand() -> None:
    arena = _arena(FakePinning())
    assert arena.tensor.shape == (40, *EVEN.sizes)
    assert (arena.ready, arena.capacity, arena.chunk_pages) == (0, 40, 16)
    assert [arena.grow() for _ in range(4)] == [16, 16, 8, 0]
    # The least common multiple of 960 and 4096 bytes is 64 pages, four times the 16 that stay together.
    assert _arena(FakePinning(), 2, ODD, chunk=1).chunk_pages == 64 * mmap.PAGESIZE // 4096
    assert _arena(FakePinning(), 2, EVEN, chunk=CHUNK_BYTES).chunk_pages == CHUNK_BYTES // EVEN.bytes


def test_without_a_device_all_is_ready_at_once_and_takes_no_memory_before_it_is_touched() -> None:
    arena = HostArena(EVEN, 4096, device=torch.device("cpu"), poison=False)
    assert arena.ready == arena.capacity == 4096
    assert arena.grow() == 0
    assert _resident(arena._memory) == 0
    assert not arena.tensor[4095].any()
    arena.check()
    arena.close()
    arena.close()
    assert arena.ready == 0
    arena.check()
    assert torch.isnan(_arena(None, pages=3).tensor).all()
    assert len(_arena(None, pages=0).tensor) == 0


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_chunk_that_cannot_be_pinned_is_named_and_undone_and_may_succeed_later(failing: int) -> None:
    pinning = FakePinning(failing_pins=(failing, failing + 1))
    arena = _arena(pinning)
    for _ in range(failing):
        arena.grow()
    ready = arena.ready
    arena.tensor[:ready].fill_(7)
    for _ in range(2):
        with pytest.raises(ResourceExhausted) as caught:
            arena.grow()
        text = str(caught.value)
        assert caught.value.field == "host_cache"
        assert "cuMemHostRegister_v2: error 2: out of memory" in text
        assert f"ulimit -l: {memlock_limit()}" in text
        assert f"{4 * failing}.0 MiB of 10.0 MiB" in text or failing == 0
        assert arena.ready == ready
        assert len(pinning.ranges) == failing
        assert _resident(arena._memory) == ready * EVEN.bytes
        arena.check()
    grow_all(arena)
    assert arena.ready == 40
    assert (arena.tensor[:ready] == 7).all()
    assert torch.isnan(arena.tensor[ready:]).all()
    arena.check()


def test_close_unpins_in_reverse_and_goes_on_past_what_fails() -> None:
    pinning = FakePinning(failing_unpins=(0, 2))
    arena = _arena(pinning)
    grow_all(arena)
    addresses = [first for first, _ in pinning.ranges]
    with pytest.raises(FailedPrecondition, match="error 701"):
        arena.close()
    assert pinning.unpinned == addresses[::-1]
    assert arena.ready == 0
    arena.check()
    arena.close()
    assert len(pinning.unpinned) == 3


def test_check_sees_what_is_wrong() -> None:
    arena = _arena(FakePinning())
    arena.grow()
    arena.check()
    arena._pinned[0] += 1
    with pytest.raises(CorruptState):
        arena.check()


def test_more_than_the_address_space_is_named() -> None:
    with pytest.raises(ResourceExhausted) as caught:
        HostArena(EVEN, 2**40, device=None, poison=False)
    assert caught.value.field == "host_cache"


def test_growth_in_the_background_tells_each_chunk(caplog: pytest.LogCaptureFixture) -> None:
    arena, added, done = _arena(FakePinning()), [], threading.Event()

    def on_ready(pages: int) -> None:
        added.append((pages, arena.ready))
        if arena.ready == 40:
            done.set()

    def on_failed(error: Exception) -> None:
        raise error

    with caplog.at_level(logging.INFO):
        growth = ArenaGrowth(arena, on_ready, on_failed)
        assert done.wait(60)
        growth.stop()
    assert added == [(16, 16), (16, 32), (8, 40)]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "pinning 10.0 MiB of host memory in the background"
    assert messages[1].startswith("pinned 10.0 MiB of 10.0 MiB of host memory in ")
    assert len(messages) == 2
    growth.stop()


def test_growth_that_fails_says_so_once_and_keeps_what_is_ready() -> None:
    arena, added, errors, failed = _arena(FakePinning(failing_pins=(1,))), [], [], threading.Event()

    def on_failed(error: Exception) -> None:
        errors.append(error)
        failed.set()

    growth = ArenaGrowth(arena, added.append, on_failed)
    assert failed.wait(60)
    growth.stop()
    assert added == [16]
    assert arena.ready == 16
    assert [type(error) for error in errors] == [ResourceExhausted]


def test_growth_stops_between_chunks() -> None:
    arena, entered, may_go_on = _arena(FakePinning()), threading.Event(), threading.Event()

    def on_ready(pages: int) -> None:
        entered.set()
        may_go_on.wait(60)

    growth = ArenaGrowth(arena, on_ready, lambda error: None)
    assert entered.wait(60)
    growth._stopping.set()  # as the first thing that `stop` does, while the chunk is still under way
    may_go_on.set()
    growth.stop()
    assert arena.ready == 16
    arena.check()


def test_growing_all_tells_its_progress_and_raises_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    progress: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        grow_all(_arena(FakePinning()), lambda *each: progress.append(each))
        assert progress == [(16, 40), (32, 40), (40, 40)]
        with pytest.raises(ResourceExhausted):
            grow_all(_arena(FakePinning(failing_pins=(2,))))
        before = len(caplog.records)
        grow_all(_arena(None))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "pinning 10.0 MiB of host memory"
    assert messages[-1].startswith("pinned 8.0 MiB of 10.0 MiB of host memory in ")
    assert len(messages) == before == 4


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_populating_backs_all_of_a_range_and_keeps_what_it_holds(threads: int) -> None:
    memory = HostMemory(40 * MIB + 5)
    assert memory.address % (2 * MIB) == 0
    assert memory.bytes == 40 * MIB + mmap.PAGESIZE
    view = np.frombuffer(memory, dtype=np.uint8)
    view[3 * MIB + 1] = 9
    memory.populate(MIB, 39 * MIB, threads)
    assert _resident(memory) >= 39 * MIB
    memory.populate(0, memory.bytes, threads)
    assert _resident(memory) == memory.bytes
    assert view[3 * MIB + 1] == 9
    assert view.sum() == 9
    memory.discard(0, 4 * MIB)
    assert _resident(memory) == memory.bytes - 4 * MIB
    memory.populate(7, 0, threads)
    assert _resident(memory) == memory.bytes - 4 * MIB
    assert not view.any()


def test_a_system_without_memory_is_named() -> None:
    libc = ctypes.CDLL(None)
    memory = HostMemory(8 * mmap.PAGESIZE)
    hole = ctypes.c_void_p(memory.address + 4 * mmap.PAGESIZE)
    if libc.madvise(hole, ctypes.c_size_t(mmap.PAGESIZE), 23):
        pytest.skip("this kernel does not know MADV_POPULATE_WRITE")
    # Where nothing is mapped the kernel answers ENOMEM, as it does when it has nothing left.
    assert libc.munmap(hole, ctypes.c_size_t(mmap.PAGESIZE)) == 0
    with pytest.raises(ResourceExhausted, match=f"{8 * mmap.PAGESIZE} bytes failed: Cannot allocate memory") as caught:
        memory.populate(0, memory.bytes, 2)
    assert caught.value.field == "host_cache"


def test_a_chunk_without_memory_is_named_and_never_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        discarded: tuple[int, int] | None = None

        def __init__(self, memory: HostMemory) -> None:
            self.address = memory.address

        def populate(self, offset: int, size: int, threads: int) -> None:
            raise ResourceExhausted("nothing left", field="host_cache")

        def discard(self, offset: int, size: int) -> None:
            self.discarded = (offset, size)

    pinning = FakePinning()
    arena = _arena(pinning)
    arena.grow()
    full = Full(arena._memory)
    monkeypatch.setattr(arena, "_memory", full)
    with pytest.raises(
        ResourceExhausted, match=r"^host_cache: 4\.0 MiB of 10\.0 MiB .* 4\.0 MiB cannot be: nothing left"
    ):
        arena.grow()
    assert full.discarded == (4 * MIB, 4 * MIB)
    assert len(pinning.ranges) == 1
    arena.check()


def test_a_tensor_keeps_the_mapping() -> None:
    arena = _arena(None, pages=2)
    arena.tensor.fill_(3)
    page = arena.tensor[1]
    del arena
    gc.collect()
    assert (page == 3).all()


def test_a_child_of_a_fork_takes_nothing_from_what_it_maps_in_the_same_place() -> None:
    # MAP_FIXED (16) puts a mapping where the parent's is not: it must outlive the child's HostMemory.
    program = """if True:
        import ctypes, os
        from mtserve._core import HostMemory
        memory = HostMemory(4096)
        if os.fork() == 0:
            mmap = ctypes.CDLL(None).mmap
            mmap.restype = ctypes.c_void_p
            address = memory.address
            assert mmap(ctypes.c_void_p(address), ctypes.c_size_t(4096), 3, 16 | 2 | 32, -1, ctypes.c_long(0)) == address
            del memory
            ctypes.memset(address, 1, 4096)
            os._exit(0)
        raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_process_that_ends_while_its_arena_grows_ends_cleanly() -> None:
    program = """if True:
        import torch
        from mtserve.transfer.arena import ArenaGrowth, HostArena
        from mtserve.transfer.pool import PageShape
        class Pinning:
            def pin(self, address, size): pass
            def unpin(self, address): pass
        shape = PageShape(8, 64, 4, 128, torch.bfloat16)
        arena = HostArena(shape, 512, device=None, poison=False, pinning=Pinning(), chunk_bytes=64 << 20)
        growth = ArenaGrowth(arena, lambda pages: None, lambda error: None)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_ranges_are_refused() -> None:
    memory = HostMemory(3 * mmap.PAGESIZE)
    for call in (
        lambda: HostMemory(0),
        lambda: memory.populate(mmap.PAGESIZE, memory.bytes),
        lambda: memory.populate(-1, 1),
        lambda: memory.populate(0, -1),
        lambda: memory.populate(0, 1, 0),
        lambda: memory.populate(0, 1, 65),
        lambda: memory.discard(0, mmap.PAGESIZE + 1),
        lambda: memory.discard(1, mmap.PAGESIZE - 1),
        lambda: memory.prefer_node(-1),
        lambda: memory.prefer_node(1024),
    ):
        with pytest.raises(InvalidArgument):
            call()
    assert isinstance(memory.prefer_node(0), bool)


@pytest.mark.parametrize(
    ("online", "said", "node"),
    [("0-1", "1", 1), ("0,2", "2", 2), ("0-1", "0", 0), ("0", "0", None), ("0-1", "-1", None), ("0-1", None, None)],
)
def test_the_node_of_a_device(tmp_path: Path, online: str, said: str | None, node: int | None) -> None:
    nodes, device = tmp_path / "devices/system/node", tmp_path / "bus/pci/devices/0000:3b:00.0"
    nodes.mkdir(parents=True)
    device.mkdir(parents=True)
    (nodes / "online").write_text(online + "\n", encoding="ascii")
    if said is not None:
        (device / "numa_node").write_text(said + "\n", encoding="ascii")
    assert node_of(tmp_path, "0000:3b:00.0") == node
    assert node_of(tmp_path, "0000:3c:00.0") is None
    assert node_of(tmp_path / "nowhere", "0000:3b:00.0") is None


@pytest.mark.gpu
def test_cuda_copies_from_every_chunk_and_no_failure_lingers() -> None:
    device = torch.device("cuda:0")
    arena = HostArena(EVEN, 160, device=device, poison=True, chunk_bytes=16 * MIB)
    assert arena.bytes == 40 * MIB
    progress: list[int] = []
    grow_all(arena, lambda ready, capacity: progress.append(ready))
    assert progress == [64, 128, 160]
    assert torch.isnan(arena.tensor).all()
    values = torch.randn(arena.tensor.shape, generator=torch.Generator().manual_seed(1)).to(EVEN.dtype)
    arena.tensor.copy_(values)
    pool = torch.empty_like(values, device=device)
    for first in range(0, 160, arena.chunk_pages):
        chunk = slice(first, first + arena.chunk_pages)
        assert arena.tensor[chunk].is_pinned()
        pool[chunk].copy_(arena.tensor[chunk], non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(pool.cpu(), values)
    _pin_twice(arena)
    assert (pool.float() * 2).sum().isfinite()
    arena.close()
    torch.cuda.synchronize()
    assert not arena.tensor.is_pinned()
    assert torch.equal(arena.tensor, values)


@pytest.mark.gpu
def test_cuda_pins_in_a_thread_that_never_called_it() -> None:
    arena, errors = HostArena(EVEN, 160, device=torch.device("cuda:0"), poison=False, chunk_bytes=16 * MIB), []
    ready = threading.Event()
    growth = ArenaGrowth(arena, lambda pages: ready.set() if arena.ready == 160 else None, errors.append)
    assert ready.wait(60), errors
    growth.stop()
    assert arena.tensor[159].is_pinned()
    arena.close()


def _pin_twice(arena: HostArena) -> None:
    """A registration that must fail, after which torch finds no error."""
    with pytest.raises(FailedPrecondition, match="cuMemHostRegister_v2: error 712"):
        CudaPinning(torch.device("cuda:0")).pin(arena.tensor.data_ptr(), MIB)
    torch.cuda.synchronize()
