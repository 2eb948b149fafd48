"""Between a mover's queues and the driver: what copies is looked at, delayed or refused before the driver is asked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from mtserve.kernels.cuda import queue as queues
from mtserve.kernels.cuda.driver import address_of, batch_name, current_context
from mtserve.kernels.cuda.queue import DriverQueue
from mtserve.transfer.cuda_mover import CudaMover

P, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
WORDS = 16  # of CUDA_MEMCPY2D, 8 bytes each
SOURCE, TO, PITCH, WIDTH, ROWS = 4, 11, 13, 14, 15  # of these
STRIDED = "cuMemcpy2DAsync_v2"


class Copies(NamedTuple):
    """A call that copies: what it is called, from where to where, and how many bytes lie between the ends of each."""

    name: str
    to: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]


# The collector may run in a queue's thread, inside one of the functions that it would free.
ALIVE: list[dict[str, Any]] = []

Before = Callable[[Copies], int]
"""Called by the queue's thread before the driver: the code to fail with instead of asking it, 0 for none."""


def interpose(mover: CudaMover, kind: str, before: Before) -> None:
    """Have `before` see each call that copies of the mover's queue of `kind`, which has nothing under way.

    To the mover's end: another queue knows no ticket of this one, and who waited there for one would do so for ever.
    """
    lane = mover._lanes[kind]
    assert not lane.under_way
    calls = {batch_name(): _batches(before), STRIDED: _strided(before)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(queues, "address_of", lambda name: _address(calls[name]) if name in calls else address_of(name))
        made = DriverQueue(current_context())
    ALIVE.append(calls)
    if "submit" in vars(lane.queue):
        in_step(made)
    lane.queue = made


def in_step(queue: DriverQueue) -> None:
    """Have the driver got all of a list when `submit` returns."""
    queue.submit = partial(_submit_and_wait, queue, queue.submit)  # type: ignore[method-assign]


def _submit_and_wait(queue: DriverQueue, submit: Callable[[], int]) -> int:
    ticket = submit()
    queue.wait(ticket)
    return ticket


def _address(function: Any) -> int:
    return ctypes.cast(function, P).value or 0


def _batches(before: Before) -> Any:
    failed = () if batch_name().endswith("_v2") else (P,)
    kind = ctypes.CFUNCTYPE(INT, P, P, P, SIZE, P, P, SIZE, *failed, P)
    real = kind(address_of(batch_name()))

    def call(to: int, source: int, sizes: int, count: int, *rest: Any) -> int:
        lists = [np.array((ctypes.c_int64 * count).from_address(each)) for each in (to, source, sizes)]
        return before(Copies(batch_name(), *lists)) or real(to, source, sizes, count, *rest)

    return kind(call)


def _strided(before: Before) -> Any:
    kind = ctypes.CFUNCTYPE(INT, P, P)
    real = kind(address_of(STRIDED))

    def call(shape: int, stream: int) -> int:
        words = (ctypes.c_int64 * WORDS).from_address(shape)
        span = (words[ROWS] - 1) * words[PITCH] + words[WIDTH]
        lists = [np.array([each], dtype=np.int64) for each in (words[TO], words[SOURCE], span)]
        return before(Copies(STRIDED, *lists)) or real(shape, stream)

    return kind(call)
