"""Many simulations at once, in threads: the simulator holds the interpreter's lock only between chunks of a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from mtserve.trace.schema import Progress

T = TypeVar("T")


class Rounds:
    """Up to `threads` jobs at once. Results come in the order of the jobs, whatever `threads` is."""

    def __init__(self, threads: int) -> None:
        self._threads, self._lock = threads, threading.Lock()
        self._ended = False

    def run(self, jobs: Sequence[Callable[[Progress], T]], steps: int, report: Progress) -> list[T]:
        """The results of `jobs`, each given a progress that ends at `steps`; `report` hears of all together.

        The first error, in the order of the jobs, is raised once all others have ended, as they do at their next report.
        """
        done = [0] * len(jobs)
        self._ended = False

        def step(place: int, now: int, total: int) -> None:
            with self._lock:
                if self._ended:
                    raise _Ended
                done[place] = now
                report(sum(done), steps * len(jobs))

        with ThreadPoolExecutor(self._threads) as pool:
            futures = [pool.submit(job, partial(step, place)) for place, job in enumerate(jobs)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                with self._lock:
                    self._ended = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class _Ended(Exception):
    """Another job has failed, or the user has had enough."""
