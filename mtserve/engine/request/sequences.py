"""Recently used sequences in memory, so that a warm request neither reads the store nor hashes its history."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from mtserve.engine.request.sequence import SequenceBuilder, UserSequence
from mtserve.history.store import HistoryStore
from mtserve.types import Chain, History, Rows

_STRIPES = 4096


@dataclass
class _Entry:
    """Growable buffers. Sequences handed out are views of their front, which is never written again."""

    sequence: UserSequence
    features: Rows | None
    first: int
    rows: Rows  # [capacity], used up to position - first
    chain: Chain  # [capacity], used up to the prefix

    @property
    def bytes(self) -> int:
        return self.rows.nbytes + self.chain.nbytes


class SequenceCache:
    """An LRU of sequences over a history store, bounded in bytes. Safe to use from any thread."""

    def __init__(self, store: HistoryStore, builder: SequenceBuilder, capacity_bytes: int) -> None:
        self.store = store
        self.builder = builder
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        # Counts changes by stripe of users: what was read while one happened may be stale, and is not kept.
        self._changes = [0] * _STRIPES
        self._changing = [threading.Lock() for _ in range(_STRIPES)]

    def get(self, user_id: str) -> UserSequence:
        """The user's sequence with every acknowledged change. Raises NotFound."""
        stripe = _stripe(user_id)
        with self._lock:
            entry = self._entries.get(user_id)
            if entry is not None:
                self._entries.move_to_end(user_id)
                return entry.sequence
            before, builder = self._changes[stripe], self.builder
        history = self.store.read(user_id, last=builder.config.max_history)
        sequence = builder.build(user_id, history)
        with self._lock:
            if self._changes[stripe] == before and self.builder is builder:
                self._insert(
                    user_id, _Entry(sequence, history.features, history.first, history.behaviours, sequence.chain)
                )
        return sequence

    def changing(self, user_id: str) -> threading.Lock:
        """To be held from a change in the store until it was told here: two changes of one user never interleave."""
        return self._changing[_stripe(user_id)]

    def appended(self, user_id: str, rows: Rows, position: int) -> tuple[UserSequence, UserSequence] | None:
        """Tell of a durable append that ended at `position`; (before, after) when the user's sequence is in memory.

        The caller holds `changing(user_id)`, so that the entry can grow outside the lock that all users share.
        """
        with self._lock:
            self._changes[_stripe(user_id)] += 1
            entry, builder = self._entries.pop(user_id, None), self.builder
            self._bytes -= entry.bytes if entry is not None else 0
        if entry is None or entry.sequence.position + len(rows) != position:
            return None  # not here, or another append of this user came between: read both from the store
        before = entry.sequence
        _grow(entry, rows, builder)
        with self._lock:
            if self.builder is builder:
                self._insert(user_id, entry)
        return before, entry.sequence

    def forget(self, user_id: str) -> None:
        """Tell of any other durable change of the user."""
        with self._lock:
            self._changes[_stripe(user_id)] += 1
            entry = self._entries.pop(user_id, None)
            self._bytes -= entry.bytes if entry is not None else 0

    def rebuild(self, builder: SequenceBuilder) -> None:
        """Start anew with another model's builder."""
        with self._lock:
            self.builder = builder
            self._entries.clear()
            self._bytes = 0

    def check(self) -> None:
        """Assert that sizes add up and every chain is what a fresh build gives."""
        with self._lock:
            assert self._bytes == sum(entry.bytes for entry in self._entries.values())
            for user_id, entry in self._entries.items():
                used = entry.sequence.position - entry.first
                fresh = self.builder.build(user_id, History(entry.features, entry.first, entry.rows[:used]))
                assert fresh.root == entry.sequence.root
                assert np.array_equal(fresh.chain, entry.sequence.chain)

    def _insert(self, user_id: str, entry: _Entry) -> None:
        old = self._entries.pop(user_id, None)
        self._bytes += entry.bytes - (old.bytes if old is not None else 0)
        self._entries[user_id] = entry
        while self._bytes > self.capacity_bytes and self._entries:
            self._bytes -= self._entries.popitem(last=False)[1].bytes


def _grow(entry: _Entry, rows: Rows, builder: SequenceBuilder) -> None:
    if len(rows) == 0:
        return
    old = entry.sequence
    used = old.position - entry.first
    limit = 2 * builder.config.max_history + len(rows)
    if used + len(rows) > len(entry.rows):
        skip = max(0, used + len(rows) - limit)  # rows that no later cut can reach
        entry.rows, entry.first, used = _enlarged(entry.rows[skip:used], len(rows)), entry.first + skip, used - skip
    entry.rows[used : used + len(rows)] = rows
    history = History(entry.features, entry.first, entry.rows[: used + len(rows)])
    if len(old.chain) + len(rows) > len(entry.chain):
        entry.chain = _enlarged(old.chain, len(rows))
    grown = builder.grow(old, history, entry.chain)
    if grown is None:
        grown = builder.build(old.user_id, history)
        entry.chain = grown.chain
    entry.sequence = grown


def _enlarged(values: np.ndarray, more: int) -> np.ndarray:  # type: ignore[type-arg]
    """A copy of `values` in a buffer with room for `more` and as many again."""
    buffer = np.empty(len(values) + 2 * more + len(values) // 4 + 16, dtype=values.dtype)
    buffer[: len(values)] = values
    return buffer


def _stripe(user_id: str) -> int:
    return zlib.crc32(user_id.encode()) % _STRIPES
