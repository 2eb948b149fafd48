"""Random operations on both stores against a dict of lists."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from history_rows import SCHEMA, embedded, features, outcome, rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mtserve.errors import FailedPrecondition, InvalidArgument, MtserveError, NotFound
from mtserve.history import Append, HistoryStore
from mtserve.history.memory import MemoryHistory
from mtserve.types import Rows

NAMES = st.sampled_from(["a", "b", "ü"])
STEPS = st.lists(st.integers(0, 3), max_size=9)


@dataclass
class Known:
    """The truth: all rows ever, of which the first `first` may be gone."""

    age: int | None = None
    rows: list[tuple[int, int]] = field(default_factory=list)  # (time_ms, item)
    first: int = 0


def plain(found: Rows) -> list[tuple[int, int]]:
    return list(zip(found["time_ms"].tolist(), found["item"].tolist(), strict=True))


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.truth: dict[str, Known] = {}
        self.item = 0
        self.store = self.open()

    def open(self) -> HistoryStore:
        return MemoryHistory(SCHEMA, max_append=100)

    def make(self, name: str, steps: list[int], back: int = 0) -> Rows:
        """Rows whose first time is `back` before the user's newest, unless 0 is later."""
        known = self.truth.get(name, Known()).rows
        start = max(0, (known[-1][0] if known else 0) - back)
        self.item += 100
        return rows(*(start + np.cumsum(steps, dtype=np.int64)).tolist(), item=self.item)

    def expect(self, name: str, made: Rows, position: int | None) -> int | type[MtserveError]:
        """What an append must return or raise; the truth follows."""
        known = self.truth.get(name)
        if known is None and not len(made):
            return NotFound
        end = len(known.rows) if known else 0
        if position not in (None, end):
            return FailedPrecondition
        if len(made) and known and known.rows and made["time_ms"][0] < known.rows[-1][0]:
            return InvalidArgument
        self.truth.setdefault(name, Known()).rows += plain(made)
        return end + len(made)

    @rule(name=NAMES, steps=STEPS, back=st.sampled_from([0, 0, 0, 1]), off=st.sampled_from([None, 0, 0, -1, 1]))
    def append(self, name: str, steps: list[int], back: int, off: int | None) -> None:
        made = self.make(name, steps, back)
        end = len(self.truth.get(name, Known()).rows)
        position = None if off is None else max(0, end + off)
        expected = self.expect(name, made, position)
        result = outcome(lambda: self.store.append(name, made, position))
        assert (result if isinstance(result, int) else type(result)) == expected
        assert not isinstance(result, FailedPrecondition) or result.position == end

    @rule(parts=st.lists(st.tuples(NAMES, STEPS, st.sampled_from([None, 0, 3])), max_size=6))
    def append_many(self, parts: list[tuple[str, list[int], int | None]]) -> None:
        appends, expected = [], []
        for name, steps, position in parts:
            appends.append(Append(name, self.make(name, steps), position))
            expected.append(self.expect(name, appends[-1].behaviours, position))
        results = self.store.append_many(appends)
        assert [result if isinstance(result, int) else type(result) for result in results] == expected

    @rule(name=NAMES, age=st.none() | st.integers(0, 9), steps=st.none() | STEPS)
    def put_user(self, name: str, age: int | None, steps: list[int] | None) -> None:
        history = None if steps is None else self.make(name, steps)
        known = self.truth.setdefault(name, Known())
        known.age = known.age if age is None else age
        if history is not None:
            known.rows, known.first = plain(history), 0
        assert self.store.put_user(name, None if age is None else features(age), history) == len(known.rows)

    @rule(name=NAMES, share=st.floats(0, 1.2))
    def truncate(self, name: str, share: float) -> None:
        known = self.truth.get(name)
        position = int(share * len(known.rows)) if known else 0
        result = outcome(lambda: self.store.truncate(name, position))
        if known is None:
            assert isinstance(result, NotFound)
        elif known.first <= position <= len(known.rows):
            assert result == position
            del known.rows[position:]
        else:
            assert isinstance(result, FailedPrecondition)
            assert result.position == len(known.rows)

    @rule(name=NAMES, share=st.floats(0, 1.0))
    def drop_before(self, name: str, share: float) -> None:
        known = self.truth.get(name)
        if known is not None:
            position = int(share * len(known.rows))
            first = self.store.drop_before(name, position)
            assert known.first <= first <= max(known.first, position)
            assert first > position - 4  # no more than a segment short
            known.first = first

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        assert self.store.delete(name) == (self.truth.pop(name, None) is not None)

    @rule(name=NAMES, last=st.integers(0, 20))
    def read_last(self, name: str, last: int) -> None:
        if name in self.truth:
            known, found = self.truth[name], self.store.read(name, last)
            assert plain(found.behaviours) == known.rows[max(known.first, len(known.rows) - last) :]
            assert found.position == self.store.position(name) == len(known.rows)

    @invariant()
    def all_agree(self) -> None:
        self.store.check()
        assert sorted(self.store.users()) == sorted(self.truth)
        assert self.store.count() == len(self.truth)
        for name, known in self.truth.items():
            found = self.store.read(name)
            assert (found.first, found.position) == (known.first, len(known.rows))
            assert plain(found.behaviours) == known.rows[known.first :]
            assert (None if found.features is None else found.features["age"].tolist()[0]) == known.age

    def teardown(self) -> None:
        self.store.close()


class EmbeddedMachine(StoreMachine):
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        super().__init__()

    def open(self) -> HistoryStore:
        return embedded(self.folder)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestMemory = StoreMachine.TestCase
TestEmbedded = EmbeddedMachine.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestEmbedded.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
