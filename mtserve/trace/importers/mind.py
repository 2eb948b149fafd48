"""MIND: tab-separated impressions, each with its user's history, whose items have no times."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

import numpy as np

from mtserve.errors import InvalidArgument
from mtserve.trace.importers.assemble import Draft
from mtserve.trace.importers.config import ImportConfig, keeps
from mtserve.trace.schema import Ints, Progress, TraceLimits
from mtserve.trace.text import lines
from mtserve.types import MAX_USER_ID_BYTES

_TIME = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4}) (\d{1,2}):(\d{2}):(\d{2}) (AM|PM)", re.ASCII)
_NEWS = re.compile(r"N(\d{1,18})", re.ASCII)
_SHOWN = re.compile(r"N(\d{1,18})-([01])", re.ASCII)
MAX_LINE = 4 << 20


def read(paths: Sequence[Path], config: ImportConfig, limits: TraceLimits, progress: Progress | None) -> Draft:
    """News "N123" is item 123; times are read as UTC.

    A user's history is that of its first row (rows that differ are counted as histories_ignored);
    its n items get made-up times, history_spacing_s apart, ending that long before the user's
    first request. Uses history_spacing_s, user_share, seed.
    """
    rows = _Rows(config, limits)
    for path in paths:
        for number, line in lines(path, min(MAX_LINE, limits.line_bytes), progress):
            rows.take(f"{path}:{number}", line)
    return rows.draft()


class _Rows:
    """Impressions so far as growing columns."""

    def __init__(self, config: ImportConfig, limits: TraceLimits) -> None:
        self.config, self.limits = config, limits
        self.users: dict[str, int] = {}
        self.dropped: set[str] = set()
        self.history_texts: list[str] = []
        self.history_lengths, self.history = array("q"), array("q")
        self.columns = {name: array("q") for name in ("user", "t_ms", "cand_lengths", "clicked_lengths")}
        self.cand, self.clicked = array("q"), array("q")
        self.ignored = 0

    def take(self, where: str, line: bytes) -> None:
        try:
            cells = line.decode("ascii").split("\t")
        except UnicodeDecodeError:
            raise InvalidArgument(f"{where}: not ASCII", field="line") from None
        if len(cells) != 5:
            raise InvalidArgument(f"{where}: {len(cells)} columns, expected 5 separated by tabs", field="line")
        _, name, time, history, impressions = cells
        if not self.wants(where, name):
            return
        shown = [_match(_SHOWN, word, where, "impressions") for word in impressions.split()]
        if len(shown) > self.limits.candidates:
            raise InvalidArgument(f"{where}: {len(shown)} items, limit {self.limits.candidates}", field="impressions")
        user = self.user_of(where, name, history)
        clicked = [int(match[1]) for match in shown if match[2] == "1"]
        for column, value in zip(self.columns, (user, _ms(time, where), len(shown), len(clicked)), strict=True):
            self.columns[column].append(value)
        self.cand.extend(int(match[1]) for match in shown)
        self.clicked.extend(clicked)

    def wants(self, where: str, name: str) -> bool:
        if name in self.users or name in self.dropped:
            return name in self.users
        if not 1 <= len(name) <= MAX_USER_ID_BYTES:
            raise InvalidArgument(f"{where}: {len(name)} bytes; needs 1 to {MAX_USER_ID_BYTES}", field="user")
        digest = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
        kept = bool(keeps(np.array([digest], dtype=np.uint64), self.config)[0])
        if not kept:
            self.dropped.add(name)
        return kept

    def user_of(self, where: str, name: str, history: str) -> int:
        user = self.users.setdefault(name, len(self.users))
        if user < len(self.history_texts):
            self.ignored += self.history_texts[user] != history
            return user
        items = [int(_match(_NEWS, word, where, "history")[1]) for word in history.split()]
        if len(items) > self.limits.history:
            raise InvalidArgument(f"{where}: {len(items)} items, limit {self.limits.history}", field="history")
        self.history_texts.append(history)
        self.history_lengths.append(len(items))
        self.history.extend(items)
        return user

    def draft(self) -> Draft:
        columns = {name: _ints(column) for name, column in self.columns.items()}
        lengths = _ints(self.history_lengths)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        first_ms = np.full(len(lengths), np.iinfo(np.int64).max)
        np.minimum.at(first_ms, columns["user"], columns["t_ms"])
        # n - i spacings before the first request, for item i of n.
        back = np.cumsum(lengths)[owner] - np.arange(len(owner))
        return Draft(
            user_ids=list(self.users), cand=_ints(self.cand), clicked=_ints(self.clicked), **columns,
            history_user=owner, history_items=_ints(self.history),
            history_t_ms=np.maximum(first_ms[owner] - back * self.config.history_spacing_s * 1000, 0),
            changes={"histories_ignored": self.ignored, "history_times_made_up": len(owner)},
        )  # fmt: skip


def _ints(values: array[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _match(pattern: re.Pattern[str], word: str, where: str, field: str) -> re.Match[str]:
    match = pattern.fullmatch(word)
    if match is None:
        wanted = "N123-0 or N123-1" if pattern is _SHOWN else "N123"
        raise InvalidArgument(f"{where}: {word[:80]!r} is not of the form {wanted}", field=field)
    return match


def _ms(text: str, where: str) -> int:
    """ "11/15/2019 9:55:12 AM" as ms since the epoch, without asking the locale what AM means."""
    match = _TIME.fullmatch(text)
    try:
        if match is None or not 1 <= int(match[4]) <= 12:
            raise ValueError
        month, day, year, hour, minute, second = map(int, match.groups()[:6])
        hour = hour % 12 + 12 * (match[7] == "PM")
        return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()) * 1000
    except ValueError:
        raise InvalidArgument(
            f"{where}: {text[:80]!r} is not a time such as 11/15/2019 9:55:12 AM", field="time"
        ) from None
