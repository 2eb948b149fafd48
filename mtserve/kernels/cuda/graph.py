"""Captured graphs, by the driver alone.

`torch.cuda.graph` first waits for the whole device and gives cached memory back, which stops whatever else is under way;
and it forbids calls that anything may make meanwhile, such as the collector when it frees another graph.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable

from mtserve.kernels.cuda.driver import call, queue_call

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: nothing that others do, or this thread beside it, breaks a capture


class Graph:
    """Work that was captured, to be queued as one. Knows addresses only: the memory that it uses must stay."""

    def __init__(self, executable: ctypes.c_void_p) -> None:
        self._executable = executable

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may be gone before us
            queue_call("cuGraphExecDestroy", self._executable)

    def launch(self, stream: int) -> None:
        """Queue all of it on `stream`."""
        queue_call("cuGraphLaunch", self._executable, ctypes.c_void_p(stream))


def capture(stream: int, work: Callable[[], None]) -> Graph:
    """What `work()` queues on `stream`, which nobody else uses; none of it runs now.

    `work` allocates no memory of the device, waits for nothing and reads nothing back. Raises what it raises, and CudaError
    where the driver refuses; the stream captures no longer then.
    """
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(_RELAXED))
    try:
        work()
    except BaseException:
        with contextlib.suppress(Exception):  # says again that it was broken
            call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
            _destroy(graph)
        raise
    call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
    try:
        call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    finally:
        _destroy(graph)
    return Graph(executable)


def _destroy(graph: ctypes.c_void_p) -> None:
    if graph.value:
        call("cuGraphDestroy", graph)
