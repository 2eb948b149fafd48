"""Driver calls that queue work, made by a thread in C++: the loop does not wait for hundreds of copies to be queued."""

from __future__ import annotations

from mtserve import _core
from mtserve.kernels.cuda.driver import Addresses, CudaError, Event, Launch, address_of, batch_name, error_text


class DriverQueue:
    """Lists of calls: what is added goes to the thread with the next `submit`, and lists are worked off in order.

    An event that a list records has meaning only once the list is over: before, it marks what it marked earlier. A
    queue that nobody has any more makes no further call.
    """

    def __init__(self, context: int) -> None:
        """`context`: in which the calls are made."""
        batch = batch_name()
        self._queue = _core._DriverQueue(
            set_context=address_of("cuCtxSetCurrent"),
            copy=address_of("cuMemcpyAsync"),
            copy_batch=address_of(batch) if batch else 0,
            copy_2d=address_of("cuMemcpy2DAsync_v2"),
            record=address_of("cuEventRecord"),
            wait_event=address_of("cuStreamWaitEvent"),
            launch=address_of("cuLaunchKernelEx"),
            batch_reports_failed=not batch.endswith("_v2"),
            context=context,
        )

    def copy_batch(self, to: Addresses, source: Addresses, sizes: Addresses, stream: int) -> None:
        """Add many copies: `sizes[i]` bytes, 1 or more, from `source[i]` to `to[i]`; int64 [n] each, in any order.

        A call for up to a thousand where the driver knows `cuMemcpyBatchAsync` (from CUDA 12.8 on). `stream` is not the
        default one.
        """
        self._queue.copy_batch(to, source, sizes, stream)

    def copy_strided(
        self, to: Addresses, source: Addresses, rows: Addresses, width: int, pitch: int, stream: int
    ) -> None:
        """Add many copies: rows[i] rows of `width` bytes, `pitch` bytes apart, from the address source[i] to to[i]."""
        self._queue.copy_strided(to, source, rows, width, pitch, stream)

    def record(self, event: Event, stream: int) -> None:
        """Have `event` mark where the stream stands then."""
        self._queue.record(event.handle, stream)

    def hold_back(self, stream: int, event: Event) -> None:
        """Have what is queued on `stream` from then on wait for what the event marks then."""
        self._queue.hold_back(stream, event.handle)

    def launch(self, launch: Launch, grid: int, stream: int) -> None:
        """Add a launch of `grid` blocks with the parameters' present values."""
        self._queue.launch(launch.function, grid, launch.threads, launch.shared_bytes, stream, launch.values())

    def submit(self) -> int:
        """Hand the list over; its ticket. When a call fails, copies and launches behind it are left out."""
        return self._queue.submit()

    def over(self, ticket: int) -> bool:
        """Whether all calls of the list, and of those before it, have been made."""
        return self._queue.over(ticket)

    def wait(self, ticket: int) -> None:
        """Block until the list is over, without the interpreter's lock."""
        self._queue.wait(ticket)

    def take_error(self, ticket: int) -> CudaError | None:
        """What failed first of a list that is over; asked once."""
        failed = self._queue.take_failure(ticket)
        return None if failed is None else CudaError(error_text(failed[1]), field=failed[0])
