"""Delays on the device's streams, which show what does not wait for what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from mtserve.cache.index import Copy
from mtserve.kernels.cuda.driver import Addresses
from mtserve.kernels.cuda.queue import DriverQueue
from mtserve.transfer import cuda_mover
from mtserve.transfer.cuda_mover import CudaMover
from mtserve.transfer.mover import LOAD

MS = 2_000_000  # cycles in a millisecond or a little more


def group_all_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the shortest load come by groups of layers, which saves large ones."""
    monkeypatch.setattr(cuda_mover, "GROUPED_LOAD_BYTES", 1)
    monkeypatch.setattr(cuda_mover, "GROUPED_PIECE_BYTES", 1)
    monkeypatch.setattr(cuda_mover, "STRIDED_BYTES", 1)


def delay_stream(stream: torch.cuda.Stream, cycles: int) -> None:
    """What is queued on `stream` from now on begins so much later."""
    if cycles:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)


def delay_submissions(mover: CudaMover, cycles: Callable[[str], int]) -> None:
    """Before the copies of each submission, `cycles("load" or "store")` pass on their stream."""
    submit = mover.submit

    def late(kind: str, copies: Sequence[Copy]) -> None:
        delay_stream(mover._lanes[kind].stream, cycles(kind))
        submit(kind, copies)

    mover.submit = late  # type: ignore[method-assign]


def in_step(mover: CudaMover) -> None:
    """Have the driver got all of a submission when it returns: what a test then does to the streams comes after it."""
    for lane in mover._lanes.values():
        lane.queue.submit = partial(_submit_and_wait, lane.queue, lane.queue.submit)  # type: ignore[method-assign]


def _submit_and_wait(queue: DriverQueue, submit: Callable[[], int]) -> int:
    ticket = submit()
    queue.wait(ticket)
    return ticket


def delay_groups(monkeypatch: pytest.MonkeyPatch, mover: CudaMover, cycles: Callable[[int, int], int]) -> None:
    """Before each group of layers of a grouped load, `cycles(load, group)` pass; loads are counted from 0."""
    queue, base, page_bytes = mover._lanes[LOAD].queue, mover.pool.data_ptr(), mover.pool[:1].nbytes
    real, load, group, begun = queue.copy_strided, -1, 0, -1

    def late(to: Addresses, source: Addresses, rows: Addresses, width: int, pitch: int, stream: int) -> None:
        nonlocal load, group, begun
        layer_offset = int(to[0] - base) % page_bytes
        if layer_offset != begun:  # the first piece of its group
            load, group = (load + 1, 0) if layer_offset == 0 else (load, group + 1)
            begun = layer_offset
            queue.wait(queue.submit())  # what comes before the delay
            delay_stream(mover._lanes[LOAD].stream, cycles(load, group))
        real(to, source, rows, width, pitch, stream)

    monkeypatch.setattr(queue, "copy_strided", late)
