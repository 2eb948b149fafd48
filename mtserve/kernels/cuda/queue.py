"""Driver calls that queue work, made by a thread in C++: the loop does not wait for hundreds of copies to be queued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mtserve import _core
from mtserve.kernels.cuda.driver import Addresses, CudaError, Event, address_of, batch_name, error_text

PageLink: TypeAlias = _core._PageLink
PageKernel: TypeAlias = _core._PageKernel


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

    def record(self, event: Event, stream: int) -> None:
        """Have `event` mark where the stream stands then."""
        self._queue.record(event.handle, stream)

    def hold_back(self, stream: int, event: Event) -> None:
        """Have what is queued on `stream` from then on wait for what the event marks then."""
        self._queue.hold_back(stream, event.handle)

    def move(
        self,
        link: PageLink,
        to_pool: bool,
        gpu_pages: Sequence[npt.NDArray[np.int32]],
        host_pages: Sequence[npt.NDArray[np.int32]],
        steps: list[int],
        stream: int,
        make_stream: int = 0,
        kernel: PageKernel | None = None,
    ) -> None:
        """Add copies of pages between the two sides of `link`, whose twins lie at the same place of both lists of arrays.

        `steps`, eight numbers each: copy layers [first, last) of pages [begin, end) of all arrays, then have the event
        `copied`, unless it is 0, mark where `stream` stands. Where the event `made` is not 0, `make_stream` waits for that
        and runs `kernel` over the same layers of pages [make begin, make end), and `made` marks where it stands: begin, end,
        first, last, copied, make begin, make end, made. Raises InvalidArgument for what there is not, and adds nothing then.
        """
        self._queue.move(link, to_pool, gpu_pages, host_pages, steps, stream, make_stream, kernel)

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
