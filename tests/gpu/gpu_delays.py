"""Delays on the device's streams, which show what does not wait for what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from gpu_driver import STRIDED, Copies, interpose

from mtserve.cache.index import Copy
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


def delay_groups(mover: CudaMover, cycles: Callable[[int, int], int]) -> None:
    """Before each group of layers of a grouped load, `cycles(load, group)` pass; loads are counted from 0."""
    base, page_bytes = mover.pool.data_ptr(), mover.pool[:1].nbytes
    load, group, begun = -1, 0, -1

    def late(copies: Copies) -> int:
        nonlocal load, group, begun
        layer_offset = int(copies.to[0] - base) % page_bytes
        if copies.name == STRIDED and layer_offset != begun:  # the first piece of its group
            load, group = (load + 1, 0) if layer_offset == 0 else (load, group + 1)
            begun = layer_offset
            delay_stream(mover._lanes[LOAD].stream, cycles(load, group))
        return 0

    interpose(mover, LOAD, late)
