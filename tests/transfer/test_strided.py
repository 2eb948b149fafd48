"""Strided copies queued in C++, over a function that stands in for the driver's and reads what it is handed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from mtserve import _core
from mtserve.errors import InvalidArgument

UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED
STREAM = 77


class Side(ctypes.Structure):
    """One side of CUDA_MEMCPY2D as cuda.h has it."""

    _fields_ = [
        ("x", ctypes.c_size_t), ("y", ctypes.c_size_t), ("type", ctypes.c_int), ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64), ("array", ctypes.c_void_p), ("pitch", ctypes.c_size_t),
    ]  # fmt: skip


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [("source", Side), ("to", Side), ("width", ctypes.c_size_t), ("rows", ctypes.c_size_t)]


Driver = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Copy2D), ctypes.c_void_p)


def copies(refuse: Callable[[int], int] = lambda call: 0) -> tuple[int, list[int], object]:
    """The address of a function that copies as it is told, the widths that it was told, and what keeps it alive."""
    told: list[int] = []

    def copy(shape: ctypes._Pointer[Copy2D], stream: int) -> int:
        code = refuse(len(told))
        told.append(shape[0].width)
        source, to = shape[0].source, shape[0].to
        assert stream == STREAM and source.type == to.type == UNIFIED
        assert not (source.x or source.y or to.x or to.y or source.array or to.array or source.host or to.host)
        for row in range(0 if code else shape[0].rows):
            ctypes.memmove(to.device + row * to.pitch, source.device + row * source.pitch, shape[0].width)
        return code

    function = Driver(copy)
    return ctypes.cast(function, ctypes.c_void_p).value or 0, told, function


def test_rows_of_each_piece_and_no_others_are_copied() -> None:
    source = np.random.default_rng(3).integers(0, 256, (12, 40), dtype=np.uint8)
    to = np.zeros_like(source)
    function, told, _alive = copies()
    first = np.array([0, 5, 9], dtype=np.int64) * 40 + 8  # from byte 8 of rows 0, 5 and 9
    rows = np.array([3, 1, 2], dtype=np.int64)
    where = [first + each.ctypes.data for each in (to, source)]
    assert _core._copy_strided(function, *where, rows, 16, 40, STREAM) == 0
    expected = np.zeros_like(source)
    for row in (0, 1, 2, 5, 9, 10):
        expected[row, 8:24] = source[row, 8:24]
    assert (to == expected).all()
    assert told == [16] * 3


def test_a_refusal_ends_it_and_is_told() -> None:
    memory, one = np.zeros(64, dtype=np.uint8), np.ones(4, dtype=np.int64)
    function, told, _alive = copies(lambda call: 999 if call == 2 else 0)
    at = np.full(4, memory.ctypes.data, dtype=np.int64)
    assert _core._copy_strided(function, at, at + 32, one, 8, 8, STREAM) == 999
    assert len(told) == 3


@pytest.mark.parametrize("field", ["to", "source", "rows"])
def test_arrays_of_other_types_and_lengths_are_refused(field: str) -> None:
    function, told, _alive = copies()
    arrays = {name: np.ones(2, dtype=np.int64) for name in ("to", "source", "rows")}
    for wrong in (np.ones(2, dtype=np.int32), np.ones((2, 1), dtype=np.int64), np.ones(3, dtype=np.int64)):
        with pytest.raises(InvalidArgument, match="int64 array"):
            _core._copy_strided(function, *{**arrays, field: wrong}.values(), 8, 8, STREAM)
    assert not told
