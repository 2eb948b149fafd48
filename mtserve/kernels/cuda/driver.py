"""The few calls of the CUDA driver that our kernels need, over ctypes: every return code is checked.

Uses the thread's current context, which torch sets with its first call there, and `use_context` at any time. Calls that
only queue work keep the interpreter's lock: they are over sooner than other threads would give it back.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtserve.errors import FailedPrecondition

TENSOR_MAP_BYTES = 128
# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion, CUfunction_attribute of cuda.h
_TYPES = {torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}  # fp8 as bytes
_SWIZZLES = {32: 1, 64: 2, 128: 3}  # by bytes of a box's row
_L2_PROMOTION_256_BYTES = 3
_MAX_DYNAMIC_SHARED_BYTES = 8
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_REGISTER_PORTABLE = 1  # pinned for every context, not the current one alone
_EVENT_WAIT_EXTERNAL = 1
_NOT_READY = 600  # CUDA_ERROR_NOT_READY

# Of the calls that every batch makes many of: plain integers are given to them sooner than made objects of ctypes.
_ARGUMENTS = {
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuEventQuery": (ctypes.c_void_p,),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuStreamWaitEvent": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
}

Addresses = npt.NDArray[np.int64]


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
    function = getattr(_library(keeps_lock=keeps_lock), name)
    function.argtypes = _ARGUMENTS.get(name)
    return function


@cache
def address_of(name: str) -> int:
    """Of a function of the driver, for callers in C++."""
    return ctypes.cast(_function(name, True), ctypes.c_void_p).value or 0


def error_text(code: int) -> str:
    """What the driver says of an error."""
    text = ctypes.c_char_p()
    _library().cuGetErrorString(code, ctypes.byref(text))
    return f"error {code}: {(text.value or b'unknown').decode()}"


def _check(name: str, code: int) -> None:
    if code:
        raise CudaError(error_text(code), field=name)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver without the interpreter's lock. Raises CudaError."""
    _check(name, _function(name, False)(*arguments))


def queue_call(name: str, *arguments: Any) -> None:
    """Likewise with the lock, for what is over at once."""
    _check(name, _function(name, True)(*arguments))


def register_host(address: int, size: int) -> None:
    """Pin `size` bytes of host memory from `address`, whole pages of the system, for the copies of every device.

    Takes milliseconds, without the interpreter's lock. Raises CudaError; nothing is pinned then.
    """
    call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(_REGISTER_PORTABLE))


def unregister_host(address: int) -> None:
    """Unpin what was pinned from `address`. Takes milliseconds, without the interpreter's lock."""
    call("cuMemHostUnregister", ctypes.c_void_p(address))


@cache
def batch_name() -> str:
    """What this driver calls the copy of many; "" where it has none."""
    names = ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync")
    return next((name for name in names if hasattr(_library(keeps_lock=True), name)), "")


def current_context() -> int:
    """The context that is current in this thread."""
    handle = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(handle))
    return handle.value or 0


def use_context(context: int) -> None:
    """Make `context` current in this thread; a thread that has not called CUDA yet has none."""
    queue_call("cuCtxSetCurrent", context)


class OwnStream:
    """A stream of the current context that nobody else has: torch hands out the same 32 of a device again and again.

    Does not wait for the default stream.
    """

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        call("cuStreamCreate", ctypes.byref(self._handle), ctypes.c_uint(_STREAM_NON_BLOCKING))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may be gone before us
            _function("cuStreamDestroy_v2", True)(self._handle)

    @property
    def handle(self) -> int:
        return self._handle.value or 0


class Event:
    """A place on a stream to wait for; used again and again."""

    def __init__(self, *, timed: bool = False) -> None:
        self._handle = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(self._handle), ctypes.c_uint(0 if timed else _EVENT_DISABLE_TIMING))
        self.handle = self._handle.value or 0

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may be gone before us
            _function("cuEventDestroy_v2", True)(self._handle)

    def record(self, stream: int) -> None:
        """Mark where the stream stands."""
        queue_call("cuEventRecord", self.handle, stream)

    def hold_back(self, stream: int, *, external: bool = False) -> None:
        """What is queued on `stream` from now on waits for what the event marks now.

        `external`: `stream` is being captured, and the graph waits at each launch for what the event marks then.
        """
        queue_call("cuStreamWaitEvent", stream, self.handle, _EVENT_WAIT_EXTERNAL if external else 0)

    def passed(self) -> bool:
        """Whether the device has come to where the event was recorded last."""
        code = _function("cuEventQuery", True)(self.handle)
        if code == _NOT_READY:
            return False
        _check("cuEventQuery", code)
        return True

    def seconds_since(self, earlier: Event) -> float:
        """From `earlier` to this one on the device's clock, negative when it was the later; both timed and passed."""
        milliseconds = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(milliseconds), earlier._handle, self._handle)
        return milliseconds.value / 1000

    def synchronize(self) -> None:
        """Wait, without the interpreter's lock, until the device has come to where the event was recorded last."""
        call("cuEventSynchronize", self._handle)


class Module:
    """A loaded cubin. Stays loaded for the life of the process, as captured graphs may hold its functions."""

    def __init__(self, image: bytes) -> None:
        self._handle = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._handle), image)

    def read_int(self, name: str) -> int:
        """The value of a global `const int`."""
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self._handle, name.encode())
        call("cuMemcpyDtoH_v2", ctypes.byref(value), address, ctypes.c_size_t(ctypes.sizeof(value)))
        return value.value

    def function(self, name: str, shared_bytes: int) -> Function:
        """The kernel `name`, allowed `shared_bytes` of dynamic shared memory."""
        handle = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(handle), self._handle, name.encode())
        call("cuFuncSetAttribute", handle, _MAX_DYNAMIC_SHARED_BYTES, ctypes.c_int(shared_bytes))
        return Function(handle, shared_bytes)


class Function:
    """A kernel of a module."""

    def __init__(self, handle: ctypes.c_void_p, shared_bytes: int) -> None:
        self._handle = handle
        self._shared_bytes = shared_bytes

    def prepare(self, threads: int, *parameters: Any) -> Launch:
        """For launches again and again with these `parameters`, ctypes values that the caller changes in between."""
        return Launch(self._handle, self._shared_bytes, threads, parameters)

    def launch(self, grid: int, threads: int, *parameters: Any, stream: int | None = None) -> None:
        """Launch once; as in Launch.run."""
        self.prepare(threads, *parameters).run(grid, stream)


class Launch:
    """A kernel with its parameters, of which each launch takes the present values."""

    def __init__(self, handle: ctypes.c_void_p, shared_bytes: int, threads: int, parameters: Sequence[Any]) -> None:
        self.function, self.threads, self.shared_bytes = handle.value or 0, threads, shared_bytes
        self._parameters = parameters
        addresses = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(each) for each in parameters))
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._config = _LaunchConfig(
            (1, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(self._attribute), 1
        )  # fmt: skip
        self._arguments = (ctypes.byref(self._config), handle, addresses, None)

    def values(self) -> list[bytes]:
        """The parameters' present values."""
        return [ctypes.string_at(ctypes.addressof(each), ctypes.sizeof(each)) for each in self._parameters]

    def run(self, grid: int, stream: int | None = None) -> None:
        """Launch `grid` blocks on `stream`, None: torch's current one. Parameters are copied before this returns.

        The kernel may start before those ahead of it on the stream have ended (programmatic dependent launch), so
        it must execute griddepcontrol.wait before it reads or writes what they may write or read.
        """
        self._config.grid[0] = grid
        self._config.stream = torch.cuda.current_stream().cuda_stream if stream is None else stream
        queue_call("cuLaunchKernelEx", *self._arguments)


def tensor_map(pointer: int, dtype: torch.dtype, shape: tuple[int, int], box: tuple[int, int]) -> Any:
    """Map of a contiguous matrix of `shape` (rows, columns) at `pointer` for copies of `box` (rows, columns).

    A box's row has 32, 64 or 128 bytes and is swizzled over as many; what lies outside the matrix reads as zero.
    """
    rows, columns = shape
    # The encoder wants 64-byte alignment, which ctypes does not promise; the view keeps the buffer alive.
    raw = ctypes.create_string_buffer(TENSOR_MAP_BYTES + 64)
    made = (ctypes.c_char * TENSOR_MAP_BYTES).from_buffer(raw, -ctypes.addressof(raw) % 64)
    call(
        "cuTensorMapEncodeTiled", made, _TYPES[dtype], ctypes.c_uint32(2), ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * dtype.itemsize),
        (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1),
        0, _SWIZZLES[box[1] * dtype.itemsize], _L2_PROMOTION_256_BYTES, 0,
    )  # fmt: skip
    return made
