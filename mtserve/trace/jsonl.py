"""The trace as lines of JSON, plain or gzip: an optional meta line, histories, requests in time order."""

from __future__ import annotations

import gzip
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mtserve.errors import InvalidArgument
from mtserve.trace.csr import offsets_of
from mtserve.trace.meta import meta_from_dict, meta_to_dict
from mtserve.trace.schema import CLICK, Ints, Progress, SmallInts, Trace, TraceLimits, TraceMeta
from mtserve.trace.text import lines
from mtserve.types import MAX_USER_ID_BYTES

_FIELDS = {
    "history": frozenset({"kind", "user", "t_ms", "items", "actions"}),
    "request": frozenset({"kind", "user", "t_ms", "session", "cand", "clicked", "actions"}),
}
_INT64, _INT32 = 2**63 - 1, 2**31 - 1
BLOCK = 16_384


def read(path: Path, limits: TraceLimits, progress: Progress | None = None) -> Trace:
    """The trace in `path`. Raises InvalidArgument naming file, line and field."""
    reader = _Reader(path, limits)
    for number, line in lines(path, limits.line_bytes, progress):
        reader.line = number
        reader.take(line)
    return reader.trace()


class _Reader:
    """Rows so far as growing columns; `line` is where errors point to."""

    def __init__(self, path: Path, limits: TraceLimits) -> None:
        self.path, self.limits, self.line = path, limits, 0
        self.meta: TraceMeta = TraceMeta(name=path.name.split(".")[0])
        self.users: dict[str, int] = {}
        self.last_ms: list[int] = []  # of each user, in its history
        self.history_lengths = array("q")
        self.history = {"items": array("q"), "t_ms": array("q"), "actions": array("q")}
        self.requests = {name: array("q") for name in ("user", "t_ms", "session", "cand_length", "clicked_length")}
        self.values = {"cand": array("q"), "clicked": array("q"), "actions": array("q")}

    def fail(self, field: str, why: str) -> NoReturn:
        raise InvalidArgument(f"{self.path}:{self.line}: {why}", field=field)

    def take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            self.fail("line", f"not JSON: {error}"[:300])
        if not isinstance(row, dict):
            self.fail("line", "not a JSON object")
        kind = row.get("kind")
        if kind == "request":
            self.take_request(row)
        elif kind == "history":
            self.take_history(row)
        elif kind == "meta" and self.line == 1:
            self.meta = meta_from_dict(row, f"{self.path}:1")
        elif kind == "meta":
            self.fail("kind", "meta belongs on the first line")
        else:
            self.fail("kind", f"{str(kind)[:80]!r} is not meta, history or request")

    def take_history(self, row: dict[str, Any]) -> None:
        self.known(row, "history")
        name = self.user_id(row)
        if name in self.users:
            self.fail("user", f"{name!r} already has a history or a request; its history must come first, once")
        items, t_ms = self.ints(row, "items"), self.ints(row, "t_ms")
        if len(items) > self.limits.history:
            self.fail("items", f"{len(items)} behaviours are above the limit of {self.limits.history}")
        if len(t_ms) != len(items):
            self.fail("t_ms", f"has {len(t_ms)} entries for {len(items)} items")
        last = 0
        for index, value in enumerate(t_ms):
            if value < last:
                self.fail(f"t_ms[{index}]", f"{value} is before {last}; times must not decrease")
            last = value
        self.add_user(name, last if t_ms else -1)
        self.history_lengths[-1] = len(items)
        self.history["items"].extend(items)
        self.history["t_ms"].extend(t_ms)
        self.history["actions"].extend(self.actions(row, len(items)))

    def take_request(self, row: dict[str, Any]) -> None:
        self.known(row, "request")
        name = self.user_id(row)
        user = self.users[name] if name in self.users else self.add_user(name, -1)
        t_ms, session = self.whole(row, "t_ms"), self.whole(row, "session", 0)
        times = self.requests["t_ms"]
        previous = times[-1] if times else 0
        if t_ms < previous:
            self.fail("t_ms", f"{t_ms} is before the previous request's {previous}; requests come in time order")
        if t_ms < self.last_ms[user]:
            self.fail("t_ms", f"{t_ms} is before the last history item of user {name!r}, {self.last_ms[user]}")
        cand, clicked = self.ints(row, "cand"), self.ints(row, "clicked")
        for field, values in (("cand", cand), ("clicked", clicked)):
            if len(values) > self.limits.candidates:
                self.fail(field, f"{len(values)} items are above the limit of {self.limits.candidates}")
        if not cand:
            self.fail("cand", "needs at least one candidate")
        if len(times) >= self.limits.requests:
            self.fail("line", f"more than {self.limits.requests} requests")
        for field, value in zip(self.requests, (user, t_ms, session, len(cand), len(clicked)), strict=True):
            self.requests[field].append(value)
        self.values["cand"].extend(cand)
        self.values["clicked"].extend(clicked)
        self.values["actions"].extend(self.actions(row, len(clicked)))

    def known(self, row: dict[str, Any], kind: str) -> None:
        if not row.keys() <= _FIELDS[kind]:
            extra = sorted(row.keys() - _FIELDS[kind])[0]
            self.fail(extra[:80], f"unknown field of a {kind}; known are {', '.join(sorted(_FIELDS[kind]))}")

    def add_user(self, name: str, last_ms: int) -> int:
        if len(self.users) >= self.limits.users:
            self.fail("user", f"more than {self.limits.users} users")
        self.users[name] = len(self.users)
        self.last_ms.append(last_ms)
        self.history_lengths.append(0)
        return len(self.users) - 1

    def user_id(self, row: dict[str, Any]) -> str:
        value = row.get("user")
        if type(value) is int and -_INT64 - 1 <= value <= _INT64:
            return str(value)
        if not isinstance(value, str):
            self.fail("user", "expected a string or an int64")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            self.fail("user", "not valid Unicode")
        if not 1 <= size <= MAX_USER_ID_BYTES:
            self.fail("user", f"{size} bytes; needs 1 to {MAX_USER_ID_BYTES}")
        return value

    def whole(self, row: dict[str, Any], name: str, default: int | None = None) -> int:
        value = row.get(name, default)
        if type(value) is not int:
            self.fail(name, "expected an integer" if name in row else "is required")
        low = 0 if name == "t_ms" else -_INT64 - 1
        if not low <= value <= _INT64:
            self.fail(name, f"{str(value)[:80]} is outside {low} to 2^63 - 1")
        return value

    def ints(self, row: dict[str, Any], name: str) -> list[int]:
        values = row.get(name)
        if type(values) is not list:
            self.fail(name, "expected a list of integers" if name in row else "is required")
        if values and not (set(map(type, values)) == {int} and min(values) >= -_INT64 - 1 and max(values) <= _INT64):
            bad = next(i for i, v in enumerate(values) if type(v) is not int or not -_INT64 - 1 <= v <= _INT64)
            self.fail(f"{name}[{bad}]", f"{str(values[bad])[:80]!r} is not an int64")
        return values

    def actions(self, row: dict[str, Any], count: int) -> list[int]:
        if "actions" not in row:
            return [CLICK] * count
        values = self.ints(row, "actions")
        if len(values) != count:
            self.fail("actions", f"has {len(values)} entries for {count} items")
        for index, value in enumerate(values):
            if not 0 <= value <= _INT32:
                self.fail(f"actions[{index}]", f"{value} is outside 0 to 2^31 - 1")
        return values

    def trace(self) -> Trace:
        history, requests, values = self.history, self.requests, self.values
        return Trace(
            user_ids=tuple(self.users),
            history_offsets=offsets_of(_wide(self.history_lengths)),
            history_items=_wide(history["items"]),
            history_t_ms=_wide(history["t_ms"]),
            history_actions=_small(history["actions"]),
            user=_small(requests["user"]),
            t_ms=_wide(requests["t_ms"]),
            session=_wide(requests["session"]),
            cand_offsets=offsets_of(_wide(requests["cand_length"])),
            cand_items=_wide(values["cand"]),
            clicked_offsets=offsets_of(_wide(requests["clicked_length"])),
            clicked_items=_wide(values["clicked"]),
            clicked_actions=_small(values["actions"]),
            meta=self.meta,
        )


def _wide(values: array[int]) -> Ints:
    return np.frombuffer(values, dtype=np.int64) if len(values) else np.empty(0, dtype=np.int64)


def _small(values: array[int]) -> SmallInts:
    return _wide(values).astype(np.int32)


def write(trace: Trace, path: Path, suffix: str, progress: Progress | None = None) -> None:
    """Write every line; gzip when `suffix` is .jsonl.gz, without a time or name, so that bytes repeat."""
    with path.open("wb") as raw:
        if suffix == ".jsonl.gz":
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
                _write_lines(trace, packed.write, progress)
        else:
            _write_lines(trace, raw.write, progress)


def _write_lines(trace: Trace, put: Callable[[bytes], object], progress: Progress | None) -> None:
    total = trace.users + trace.requests
    for done, row in enumerate(_rows(trace)):
        put(json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
        if progress is not None and (done % BLOCK == 0 or done == total):
            progress(done, total)


def _rows(trace: Trace) -> Iterator[dict[str, Any]]:
    yield {"kind": "meta", **meta_to_dict(trace.meta)}
    for index, user in enumerate(trace.user_ids):
        items, t_ms, actions = trace.history(index)
        history = {"kind": "history", "user": user, "t_ms": t_ms.tolist(), "items": items.tolist()}
        yield history | _actions(actions)
    for _, user, _, time, session, cand, clicked, actions in trace.iter_requests():
        request = {"kind": "request", "t_ms": time, "user": user, "session": session, "cand": cand.tolist()}
        yield request | {"clicked": clicked.tolist()} | _actions(actions)


def _actions(actions: SmallInts) -> dict[str, list[int]]:
    return {} if (actions == CLICK).all() else {"actions": actions.tolist()}
