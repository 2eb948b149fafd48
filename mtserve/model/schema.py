"""The feature schema: which named features a user, a behaviour and a candidate have.

Rows travel as numpy structured arrays with one named field a feature, packed little-endian:
int64 for a categorical feature, float32 [width] for a dense one. Behaviours and candidates
also have `time_ms` (int64, ms since the epoch). A row's bytes are what the history store
keeps and what the prefix hash covers, so two schemas never share states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mtserve.errors import InvalidArgument
from mtserve.types import Rows

KINDS = ("categorical", "dense")
ROLES = ("item", "cross", "context")
MAX_FEATURES = 256
MAX_WIDTH = 65536
MAX_BUCKETS = 1 << 31


@dataclass(frozen=True)
class Feature:
    """One named feature.

    A categorical value is any int64; it is hashed into one of `buckets` rows of `dim`
    float values in table `table` (its own name unless given, so that a behaviour's item and
    a candidate's item can share one). A dense value is `width` floats, taken as they are.
    `role` matters to candidates alone: what belongs to the item, what crosses user and item
    (dropped by `cross_features=False`), and what is the request's context.
    """

    name: str
    kind: str = "categorical"
    buckets: int = 0
    dim: int = 0
    width: int = 0
    table: str = ""
    role: str = "item"

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == "time_ms":
            raise InvalidArgument(f"{self.name!r} is not an identifier other than time_ms", field="feature.name")
        if self.kind not in KINDS:
            raise InvalidArgument(f"{self.kind!r} is not one of {', '.join(KINDS)}", field=f"{self.name}.kind")
        if self.role not in ROLES:
            raise InvalidArgument(f"{self.role!r} is not one of {', '.join(ROLES)}", field=f"{self.name}.role")
        if self.kind == "categorical":
            self._bound("buckets", self.buckets, MAX_BUCKETS)
            self._bound("dim", self.dim, MAX_WIDTH)
            object.__setattr__(self, "table", self.table or self.name)
        else:
            self._bound("width", self.width, MAX_WIDTH)

    def _bound(self, field: str, value: int, limit: int) -> None:
        if not 1 <= value <= limit:
            raise InvalidArgument(f"{value} is outside 1 to {limit}", field=f"{self.name}.{field}")

    @property
    def dtype(self) -> tuple[Any, ...]:
        """The numpy field of this feature."""
        return (self.name, "<i8") if self.kind == "categorical" else (self.name, "<f4", (self.width,))

    @property
    def encoded_width(self) -> int:
        """Floats this feature contributes to its token's input."""
        return self.dim if self.kind == "categorical" else self.width


@dataclass(frozen=True)
class FeatureSchema:
    """The features of a user (one token each), of a behaviour and of a candidate (one token a row)."""

    user: tuple[Feature, ...]
    behaviour: tuple[Feature, ...]
    candidate: tuple[Feature, ...]

    def __post_init__(self) -> None:
        tables: dict[str, tuple[int, int]] = {}
        for group in ("user", "behaviour", "candidate"):
            features = tuple(getattr(self, group))
            object.__setattr__(self, group, features)
            if len(features) > MAX_FEATURES or (not features and group != "user"):
                raise InvalidArgument(f"{len(features)} features; needs 1 to {MAX_FEATURES}", field=group)
            if len({feature.name for feature in features}) != len(features):
                raise InvalidArgument("two features share a name", field=group)
            for feature in features:
                shape = (feature.buckets, feature.dim)
                if feature.kind == "categorical" and tables.setdefault(feature.table, shape) != shape:
                    raise InvalidArgument(f"table {feature.table!r} has another shape elsewhere", field=feature.name)

    @cached_property
    def tables(self) -> dict[str, tuple[int, int]]:
        """Embedding tables by name: (buckets, dim)."""
        every = (*self.user, *self.behaviour, *self.candidate)
        return {f.table: (f.buckets, f.dim) for f in every if f.kind == "categorical"}

    @cached_property
    def user_dtype(self) -> np.dtype[np.void]:
        return np.dtype([feature.dtype for feature in self.user])

    @cached_property
    def behaviour_dtype(self) -> np.dtype[np.void]:
        return np.dtype([("time_ms", "<i8"), *(feature.dtype for feature in self.behaviour)])

    @cached_property
    def candidate_dtype(self) -> np.dtype[np.void]:
        return np.dtype([("time_ms", "<i8"), *(feature.dtype for feature in self.candidate)])

    def user_row(self, values: Mapping[str, Any]) -> Rows:
        """[1] row of U features; features not named are 0."""
        columns = {name: [value] for name, value in values.items()}
        return _fill("features", self.user_dtype, columns, 1)

    def behaviours(self, columns: Mapping[str, Any]) -> Rows:
        """[n] rows from equally long columns; `time_ms` is required and never decreases."""
        rows = _fill("behaviours", self.behaviour_dtype, columns, None)
        if "time_ms" not in columns:
            raise InvalidArgument("is required", field="behaviours.time_ms")
        return self.check_behaviours(rows)

    def candidates(self, columns: Mapping[str, Any], context: Mapping[str, Any] | None = None) -> Rows:
        """[n] rows from equally long columns; `time_ms` defaults to -1 (now).

        `context` gives one value for each context feature, the same for every candidate.
        """
        roles = {feature.name: feature.role for feature in self.candidate}
        for name in context or {}:
            if roles.get(name) != "context":
                raise InvalidArgument("is not a context feature of this model", field=f"context.{name}")
        rows = _fill("candidates", self.candidate_dtype, {"time_ms": None, **columns}, None)
        if columns.get("time_ms") is None:
            rows["time_ms"] = -1
        elif (rows["time_ms"] < -1).any():
            raise InvalidArgument("must be -1 (now) or at least 0", field="candidates.time_ms")
        for name, value in (context or {}).items():
            rows[name] = _column(f"context.{name}", self.candidate_dtype[name], [value], 1)[0]
        return rows

    def check_behaviours(self, rows: Rows, previous_ms: int = 0, field: str = "behaviours") -> Rows:
        """`rows`, once their dtype and times are right; `previous_ms` is the time they follow."""
        if rows.dtype != self.behaviour_dtype or rows.ndim != 1:
            raise InvalidArgument("rows are not of this model's behaviour schema", field=field)
        times = rows["time_ms"]
        # Compared, not subtracted: int64 would wrap.
        if len(times) == 0 or (previous_ms <= times[0] and bool((times[:-1] <= times[1:]).all())):
            return rows
        before_ms = np.concatenate(([previous_ms], times[:-1]))
        late = int(np.flatnonzero(before_ms > times)[0])
        raise InvalidArgument(
            f"{int(times[late])} is before the previous behaviour's {int(before_ms[late])}; times must not decrease",
            field=f"{field}[{late}].time_ms",
        )

    def to_json(self) -> str:
        return json.dumps(
            {g: [asdict(f) for f in getattr(self, g)] for g in ("user", "behaviour", "candidate")}, sort_keys=True
        )

    @classmethod
    def from_json(cls, text: str) -> FeatureSchema:
        """Inverse of `to_json`. Raises InvalidArgument on anything that is not one."""
        try:
            groups = json.loads(text)
            return cls(**{g: tuple(Feature(**f) for f in groups[g]) for g in ("user", "behaviour", "candidate")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidArgument(f"not a feature schema: {error!r}", field="schema") from None


def _fill(what: str, dtype: np.dtype[np.void], columns: Mapping[str, Any], count: int | None) -> Rows:
    """Structured rows from columns; columns that are None or missing stay 0."""
    assert dtype.names is not None or not columns
    for name in columns:
        if name not in (dtype.names or ()):
            raise InvalidArgument(f"unknown feature; known are {', '.join(dtype.names or ())}", field=f"{what}.{name}")
    given = {name: value for name, value in columns.items() if value is not None}
    if count is None:
        count = len(next(iter(given.values()))) if given else 0
    rows = np.zeros(count, dtype=dtype)
    for name, values in given.items():
        rows[name] = _column(f"{what}.{name}", dtype[name], values, count)
    return rows


def _column(field: str, dtype: np.dtype[Any], values: Any, count: int) -> np.ndarray[Any, Any]:
    """[count] or [count, width] values of `dtype`, checked for type, length and finiteness."""
    base, shape = (dtype.base, dtype.shape)
    try:
        raw = np.asarray(values)
        if base.kind == "i" and raw.dtype.kind not in "iub" and raw.size:
            raise ValueError(f"expected integers, got {raw.dtype}")
        if base.kind == "i" and raw.dtype.kind == "u" and raw.size and raw.max() > np.iinfo(np.int64).max:
            raise ValueError("a value is above 2^63 - 1")
        column = raw.astype(base)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidArgument(str(error), field=field) from None
    if shape and column.size == count * shape[0]:
        column = column.reshape(count, *shape)
    if column.shape != (count, *shape):
        raise InvalidArgument(f"expected shape {(count, *shape)}, got {column.shape}", field=field)
    if base.kind == "f" and not np.isfinite(column).all():
        raise InvalidArgument("values must be finite", field=field)
    return column
