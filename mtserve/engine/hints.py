"""Hints whose user's history is not in memory: it is read on a thread of its own, so that no append waits for that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mtserve.errors import NotFound, Unavailable
from mtserve.metrics import Metrics

log = logging.getLogger(__name__)


class Hints:
    """Calls `prefetch(user_id)` for each hinted user; once for all hints of a user until then. Safe from any thread.

    At most `limit` users wait; the hints of others are dropped. `start=False` starts no thread and calls at once.
    """

    def __init__(self, prefetch: Callable[[str], object], metrics: Metrics, *, limit: int, start: bool) -> None:
        self._prefetch = prefetch
        self._metrics = metrics
        self._limit = limit
        self._waiting: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="mtserve-hints") if start else None

    def add(self, user_id: str) -> None:
        """Have the user's states brought; never waits and never fails."""
        with self._lock:
            if self._closed:
                return
            if user_id in self._waiting:
                self._metrics.count("prefetches_superseded_total")
            elif len(self._waiting) >= self._limit:
                self._metrics.count("prefetches_dropped_total")
            elif self._reader is not None:
                self._waiting.add(user_id)
                self._reader.submit(self._read, user_id)
        if self._reader is None:
            self._attempt(user_id)

    def close(self) -> None:
        """Drop what waits and let the reading under way end."""
        with self._lock:
            self._closed = True
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, user_id: str) -> None:
        with self._lock:
            self._waiting.discard(user_id)  # before it is read: a later append may be missed, and hints again
        self._attempt(user_id)

    def _attempt(self, user_id: str) -> None:
        try:
            self._prefetch(user_id)
        except (NotFound, Unavailable):
            return  # deleted or closed meanwhile: nothing is left to bring
        except Exception:
            log.exception("the hint of user %r failed", user_id)
