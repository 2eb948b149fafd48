"""From configuration to a store."""

from __future__ import annotations

from mtserve.config import HistoryConfig
from mtserve.history.store import HistoryStore
from mtserve.model.schema import FeatureSchema


def open_history(config: HistoryConfig, schema: FeatureSchema) -> HistoryStore:
    """The store that `config.kind` names; the embedded one is created below `config.path` when absent.

    Raises FailedPrecondition when another process has the folder open, or when it holds
    rows of another schema or format; CorruptState when its files do not verify.
    """
    if config.kind == "memory":
        from mtserve.history.memory import MemoryHistory

        return MemoryHistory(schema, max_append=config.max_append)
    from mtserve.history.embedded import EmbeddedHistory
    from mtserve.history.sqlite import SqliteStorage

    return EmbeddedHistory(schema, SqliteStorage(config.path), max_append=config.max_append)
