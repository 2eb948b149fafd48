"""Messages to the engine's values and back. Counts are bounded here, before arrays are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtserve.errors import InvalidArgument
from mtserve.model.schema import FeatureSchema
from mtserve.proto.v1 import ranking_pb2 as pb
from mtserve.server import wire
from mtserve.server.status import Status
from mtserve.types import MAX_USER_ID_BYTES, History, Rows, ScoreResult

MAX_NAME = 128  # characters of a feature name that an error message may repeat
MAX_DEADLINE_MS = 3_600_000


@dataclass(frozen=True)
class Limits:
    """What one message may ask for.

    `decoded_bytes` bounds rows after decoding: features without a column take space too.
    """

    candidates: int
    behaviours: int
    decoded_bytes: int = 256 << 20


@dataclass(frozen=True)
class Converter:
    """Decodes messages of one schema under one set of limits. Everything raises InvalidArgument."""

    schema: FeatureSchema
    limits: Limits

    def candidates(self, rows: pb.Rows, context: Iterable[pb.Column]) -> Rows:
        """[count] candidate rows with the request's context in each."""
        dtype = self.schema.candidate_dtype
        columns = self._columns("candidates", rows, dtype, self.limits.candidates)
        given = self._single("context", context, dtype)
        if not columns:  # every feature 0 is legal, but the schema would take it for no rows
            columns["time_ms"] = np.full(rows.count, -1, np.int64)
        return self.schema.candidates(columns, given)

    def behaviours(self, rows: pb.Rows, field: str = "behaviours") -> Rows:
        """[count] behaviour rows; times are required and never decrease."""
        columns = self._columns(field, rows, self.schema.behaviour_dtype, self.limits.behaviours)
        if "time_ms" not in columns:
            if rows.count:
                raise InvalidArgument("is required", field=f"{field}.time_ms")
            columns["time_ms"] = np.empty(0, np.int64)
        return self.schema.behaviours(columns)

    def features(self, columns: Iterable[pb.Column]) -> Rows | None:
        """[1] row of user features; None when no column came."""
        given = self._single("features", columns, self.schema.user_dtype)
        return self.schema.user_row(given) if given else None

    def history(self, message: pb.History) -> History:
        """A whole history that the caller keeps itself, from its first behaviour."""
        behaviours = self.behaviours(message.behaviours, "history.behaviours")
        return History(self.features(message.features), 0, behaviours)

    def _columns(self, what: str, rows: pb.Rows, dtype: np.dtype[Any], limit: int) -> dict[str, Any]:
        count = int(rows.count)
        if count > limit:
            raise InvalidArgument(f"{count} is above the limit of {limit}", field=f"{what}.count")
        size, most = count * dtype.itemsize, self.limits.decoded_bytes
        if size > most:
            raise InvalidArgument(f"{count} rows take {size} bytes; the limit is {most}", field=f"{what}.count")
        columns: dict[str, Any] = {}
        if rows.HasField("time_ms"):
            _expect_length(f"{what}.time_ms", len(rows.time_ms.values), count)
            columns["time_ms"] = wire.ids(rows.time_ms)
        for column in rows.columns:
            _decode(what, column, dtype, count, columns)
        return columns

    def _single(self, what: str, given: Iterable[pb.Column], dtype: np.dtype[Any]) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for column in given:
            _decode(what, column, dtype, 1, columns)
        return {name: values[0] for name, values in columns.items()}


def _decode(what: str, column: pb.Column, dtype: np.dtype[Any], count: int, columns: dict[str, Any]) -> None:
    """Add one column to `columns`: int64 [count], or float32 [count, width]."""
    name, known = column.name, [name for name in dtype.names or () if name != "time_ms"]
    field = f"{what}.{name[:MAX_NAME]}"
    if name not in known:
        raise InvalidArgument(f"unknown feature; known are {', '.join(known)}", field=field)
    if name in columns:
        raise InvalidArgument("is given twice", field=field)
    kind, dense = column.WhichOneof("values"), dtype[name].base.kind == "f"
    if kind != ("floats" if dense else "ids"):
        wanted = "floats (a dense feature)" if dense else "ids (a categorical feature)"
        raise InvalidArgument(f"expected {wanted}, got {kind or 'nothing'}", field=field)
    if not dense:
        _expect_length(field, len(column.ids.values), count)
        columns[name] = wire.ids(column.ids)
        return
    width = dtype[name].shape[0]
    _expect_length(field, len(column.floats.values), count * width, f" ({count} rows of width {width})")
    columns[name] = wire.floats(column.floats).reshape(count, width)


def _expect_length(field: str, length: int, expected: int, why: str = "") -> None:
    if length != expected:
        raise InvalidArgument(f"has {length} values; expected {expected}{why or ' (count)'}", field=field)


def user_id(text: str) -> str:
    """`text`, once its length is right."""
    size = len(text.encode())
    if not 1 <= size <= MAX_USER_ID_BYTES:
        raise InvalidArgument(f"{size} bytes is outside 1 to {MAX_USER_ID_BYTES}", field="user_id")
    return text


def position(message: Any) -> int | None:
    """The message's optional `position`."""
    if not message.HasField("position"):
        return None
    return known_position(message.position)


def known_position(value: int) -> int:
    """A position, which counts behaviours and so is never negative."""
    if value < 0:
        raise InvalidArgument(f"{value} is below 0", field="position")
    return int(value)


def deadline_seconds(milliseconds: int) -> float | None:
    """The message's own deadline; None for none."""
    if milliseconds > MAX_DEADLINE_MS:
        raise InvalidArgument(f"{milliseconds} is above the limit of {MAX_DEADLINE_MS}", field="deadline_ms")
    return milliseconds / 1000 if milliseconds else None


def response(result: ScoreResult) -> pb.ScoreResponse:
    """The answer of one Score."""
    message = pb.ScoreResponse(
        tasks=result.tasks,
        position=result.position,
        prefix_tokens=result.prefix_tokens,
        gpu_tokens=result.gpu_tokens,
        host_tokens=result.host_tokens,
        encoded_tokens=result.encoded_tokens,
        latency_seconds=result.latency_s,
    )
    message.MergeFromString(wire.score_values(result.scores))
    return message


def failure(status: Status) -> pb.Failure:
    """The error of one item of a batch."""
    message = pb.Failure(code=status.number, message=status.message, field=status.field)
    if status.position >= 0:
        message.position = status.position
    return message
