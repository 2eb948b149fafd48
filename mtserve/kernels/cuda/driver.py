"""The few calls of the CUDA driver that our kernels need, over ctypes: every return code is checked.

Uses the thread's current context, which torch sets with its first call there, and `use_context` at any time. Calls that only queue
work keep the interpreter's lock: they are over sooner than other threads would give it back.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from mtserve.errors import FailedPrecondition

TENSOR_MAP_BYTES = 128
# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion, CUfunction_attribute of cuda.h
_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {64: 2, 128: 3}  # by bytes of a box's row
_L2_PROMOTION_256_BYTES = 3
_MAX_DYNAMIC_SHARED_BYTES = 8
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_EVENT_DISABLE_TIMING = 2


class CudaError(FailedPrecondition):
    """A call of the CUDA driver failed."""


class _Attribute(ctypes.Structure):
    """Mirrors CUlaunchAttribute: an id, padded to 8 bytes, and a union of 64, of which our one reads an int."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):
    """Mirrors CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@cache
def _library(*, keeps_lock: bool = False) -> ctypes.CDLL:
    try:
        return (ctypes.PyDLL if keeps_lock else ctypes.CDLL)("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the CUDA driver could not be loaded: {error}", field="libcuda.so.1") from None


@cache
def _function(name: str, keeps_lock: bool) -> Any:
    return getattr(_library(keeps_lock=keeps_lock), name)


def _check(name: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"error {code}: {(text.value or b'unknown').decode()}", field=name)


def _call(name: str, *arguments: Any) -> None:
    _check(name, _function(name, False)(*arguments))


def _queue(name: str, *arguments: Any) -> None:
    _check(name, _function(name, True)(*arguments))


def copy_to_device(to: int, source: int, size: int, stream: int) -> None:
    """Queue a copy of `size` bytes from the pinned address `source` to the device's address `to`."""
    _queue("cuMemcpyHtoDAsync_v2", *map(ctypes.c_void_p, (to, source)), ctypes.c_size_t(size), ctypes.c_void_p(stream))


def copy_to_host(to: int, source: int, size: int, stream: int) -> None:
    """Queue a copy of `size` bytes from the device's address `source` to the pinned address `to`."""
    _queue("cuMemcpyDtoHAsync_v2", *map(ctypes.c_void_p, (to, source)), ctypes.c_size_t(size), ctypes.c_void_p(stream))


def launch_graph(executable: int, stream: int) -> None:
    """Queue an instantiated graph (`torch.cuda.CUDAGraph.raw_cuda_graph_exec`)."""
    _queue("cuGraphLaunch", ctypes.c_void_p(executable), ctypes.c_void_p(stream))


def current_context() -> int:
    """The context that is current in this thread."""
    handle = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(handle))
    return handle.value or 0


def use_context(context: int) -> None:
    """Make `context` current in this thread; a thread that has not called CUDA yet has none."""
    _queue("cuCtxSetCurrent", ctypes.c_void_p(context))


class Event:
    """A place on a stream to wait for; used again and again."""

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(self._handle), ctypes.c_uint(_EVENT_DISABLE_TIMING))

    def record(self, stream: int) -> None:
        """Mark where the stream stands."""
        _queue("cuEventRecord", self._handle, ctypes.c_void_p(stream))

    def synchronize(self) -> None:
        """Wait, without the interpreter's lock, until the device has come to where the event was recorded last."""
        _call("cuEventSynchronize", self._handle)


class Module:
    """A loaded cubin. Stays loaded for the life of the process, as captured graphs may hold its functions."""

    def __init__(self, image: bytes) -> None:
        self._handle = ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(self._handle), image)

    def read_int(self, name: str) -> int:
        """The value of a global `const int`."""
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        _call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self._handle, name.encode())
        _call("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(ctypes.sizeof(value)))
        return value.value

    def function(self, name: str, shared_bytes: int) -> Function:
        """The kernel `name`, allowed `shared_bytes` of dynamic shared memory."""
        handle = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(handle), self._handle, name.encode())
        _call("cuFuncSetAttribute", handle, _MAX_DYNAMIC_SHARED_BYTES, ctypes.c_int(shared_bytes))
        return Function(handle, shared_bytes)


class Function:
    """A kernel of a module."""

    def __init__(self, handle: ctypes.c_void_p, shared_bytes: int) -> None:
        self._handle = handle
        self._shared_bytes = shared_bytes

    def launch(self, grid: int, threads: int, *parameters: Any) -> None:
        """Launch on torch's current stream. `parameters` are ctypes values, copied before this returns.

        The kernel may start before those ahead of it on the stream have ended (programmatic dependent launch), so
        it must execute griddepcontrol.wait before it reads or writes what they may write or read.
        """
        addresses = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(each) for each in parameters))
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        config = _LaunchConfig(
            (grid, 1, 1), (threads, 1, 1), self._shared_bytes, torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute), 1,
        )  # fmt: skip
        _call("cuLaunchKernelEx", ctypes.byref(config), self._handle, addresses, None)


def tensor_map(pointer: int, dtype: torch.dtype, shape: tuple[int, int], box: tuple[int, int]) -> Any:
    """Map of a contiguous matrix of `shape` (rows, columns) at `pointer` for copies of `box` (rows, columns).

    A box's row has 64 or 128 bytes and is swizzled over as many; what lies outside the matrix reads as zero.
    """
    rows, columns = shape
    # The encoder wants 64-byte alignment, which ctypes does not promise; the view keeps the buffer alive.
    raw = ctypes.create_string_buffer(TENSOR_MAP_BYTES + 64)
    made = (ctypes.c_char * TENSOR_MAP_BYTES).from_buffer(raw, -ctypes.addressof(raw) % 64)
    _call(
        "cuTensorMapEncodeTiled", made, _TYPES[dtype], ctypes.c_uint32(2), ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * dtype.itemsize),
        (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1),
        0, _SWIZZLES[box[1] * dtype.itemsize], _L2_PROMOTION_256_BYTES, 0,
    )  # fmt: skip
    return made
