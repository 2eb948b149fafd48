from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from history_rows import SCHEMA, embedded

from mtserve.history import HistoryStore
from mtserve.history.memory import MemoryHistory


@pytest.fixture(params=["memory", "embedded"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HistoryStore]:
    made = MemoryHistory(SCHEMA, max_append=100) if request.param == "memory" else embedded(tmp_path / "store")
    with made:
        yield made
        made.check()
