"""A small schema and rows for the history tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mtserve.errors import MtserveError
from mtserve.history.embedded import EmbeddedHistory
from mtserve.history.sqlite import SqliteStorage
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.types import Rows

SCHEMA = FeatureSchema(
    user=(Feature("age", buckets=10, dim=4), Feature("taste", kind="dense", width=3)),
    behaviour=(Feature("item", buckets=10, dim=4), Feature("seconds", kind="dense", width=1)),
    candidate=(Feature("item", buckets=10, dim=4),),
)


def outcome(call: Callable[[], int]) -> int | MtserveError:
    """What `call` returns, or the typed error that it raises."""
    try:
        return call()
    except MtserveError as error:
        return error


def rows(*times: int, item: int = 0) -> Rows:
    made = np.zeros(len(times), SCHEMA.behaviour_dtype)
    made["time_ms"] = times
    made["item"] = item + np.arange(len(times))
    made["seconds"][:, 0] = np.arange(len(times)) / 7
    return made


def features(age: int) -> Rows:
    return SCHEMA.user_row({"age": age, "taste": [age, 0.5, -1.0]})


def embedded(folder: Path, segment_rows: int = 4) -> EmbeddedHistory:
    """Small segments, so that short histories cross their borders."""
    return EmbeddedHistory(SCHEMA, SqliteStorage(folder), max_append=100, segment_rows=segment_rows)
