"""Groups of users with habits of their own, and how they are written down.

On the command line, groups are words: a name alone takes the group of that name in `PRESETS`, and
`name:field=value,...` changes it or makes a new one: "heavy casual:share=0.6 early:share=0.1,later=20".
In TOML, each is a table: [generator.groups.casual].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtserve.config import Config, option
from mtserve.errors import InvalidArgument
from mtserve.trace.schema import Floats, Ints

MAX_GROUPS = 32
MAX_TEXT = 4096
_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True)
class UserGroup(Config):
    """Habits as multiples of those that the other knobs give everyone."""

    share: float = option(0.0, "share of the users", low=0.0, high=1.0)
    activity: float = option(1.0, "multiple of the requests of a user", low=0.001, high=1_000.0)
    history: float = option(1.0, "multiple of the length of the histories", low=0.0, high=1_000.0)
    gap: float = option(1.0, "multiple of the gaps inside a session", low=0.01, high=100.0)
    taste: float = option(1.0, "multiple of the generator's taste; at most 1 comes of it", low=0.0, high=1_000.0)
    later: float = option(0.0, "how much later their day is", low=0.0, high=24.0, unit="h")


PRESETS = {
    "heavy": UserGroup(share=0.1, activity=3.0, history=2.0, gap=0.8),
    "casual": UserGroup(share=0.5, activity=0.3, history=0.4, gap=1.3, taste=0.8),
    "night": UserGroup(share=0.1, later=10.0),
}


def parse_groups(text: str) -> dict[str, UserGroup]:
    """Groups by name, in order. Raises InvalidArgument naming the group and the field at fault."""
    if len(text) > MAX_TEXT:
        raise InvalidArgument(f"{len(text)} characters are above {MAX_TEXT}", field="groups")
    groups: dict[str, UserGroup] = {}
    for word in text.split():
        name, _, pairs = word.partition(":")
        values: dict[str, Any] = {}
        for pair in filter(None, pairs.split(",")):
            key, _, value = pair.partition("=")
            try:
                values[key] = float(value)
            except ValueError:
                raise InvalidArgument(f"{pair!r} is not FIELD=NUMBER", field=f"groups.{name}") from None
        if name in groups:
            raise InvalidArgument("is given twice", field=f"groups.{name}")
        groups[name] = _group(name, values)
    _check(groups)
    return groups


def groups_text(tables: Mapping[str, Any]) -> str:
    """The words of TOML tables, by name. Raises InvalidArgument naming the group and the field at fault."""
    words = []
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InvalidArgument("expected a table", field=f"groups.{name}")
        _group(name, table)
        words.append(
            name + "".join(f"{',' if i else ':'}{key}={value}" for i, (key, value) in enumerate(table.items()))
        )
    return " ".join(words)


def _group(name: str, values: Mapping[str, Any]) -> UserGroup:
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name[:80]!r} is not a name of 1 to 32 letters, digits, - and _", field="groups")
    if name not in PRESETS and "share" not in values:
        known = ", ".join(PRESETS)
        raise InvalidArgument(f"needs a share; only {known} have one of their own", field=f"groups.{name}")
    try:
        return UserGroup.from_table({**dataclasses.asdict(PRESETS.get(name, UserGroup())), **values})
    except InvalidArgument as error:
        raise InvalidArgument(
            str(error).removeprefix(f"{error.field}: "), field=f"groups.{name}.{error.field}"
        ) from None


def _check(groups: Mapping[str, UserGroup]) -> None:
    if len(groups) > MAX_GROUPS:
        raise InvalidArgument(f"{len(groups)} are above {MAX_GROUPS}", field="groups")
    total = sum(group.share for group in groups.values())
    if total > 1 + 1e-9:
        raise InvalidArgument(f"the shares add up to {total:g}, above 1", field="groups")


@dataclass(frozen=True)
class Habits:
    """Who belongs to which group. `group`: int64 [users], an index into `kinds`, of which the last is everyone else."""

    kinds: tuple[UserGroup, ...]
    group: Ints

    @classmethod
    def draw(cls, rng: np.random.Generator, groups: Mapping[str, UserGroup], users: int) -> Habits:
        ends = np.cumsum([group.share for group in groups.values()])
        return cls((*groups.values(), UserGroup(share=1.0)), np.searchsorted(ends, rng.random(users), side="right"))

    def of(self, field: str) -> Floats:
        """[users] one field of each user's group."""
        return np.array([getattr(kind, field) for kind in self.kinds], dtype=np.float64)[self.group]
