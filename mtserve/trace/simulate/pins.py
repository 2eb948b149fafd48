"""Users whose states are kept before others', as `Engine.pin` keeps them: a campaign's, say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.schema import Progress, SmallInts
from mtserve.trace.text import lines
from mtserve.types import MAX_USER_ID_BYTES

MAX_PINS = 1 << 20  # as an engine takes


@dataclass(frozen=True, eq=False)
class Pins:
    """Who of a demand's users is pinned, bool [users]; `budget` as `EngineConfig.pin_budget`.

    `unknown`: users who were named as well and are none of the demand's.
    """

    users: npt.NDArray[np.bool_]
    budget: float
    unknown: int = 0

    @classmethod
    def of(cls, user_ids: Sequence[str], named: Sequence[str], budget: float) -> Pins:
        """Those of `user_ids` who are among `named`."""
        wanted = frozenset(named)
        users = np.fromiter((user in wanted for user in user_ids), np.bool_, len(user_ids))
        return cls(users, budget, len(wanted) - int(users.sum()))

    @property
    def numbers(self) -> SmallInts:
        """int32 [P] the pinned users."""
        return np.flatnonzero(self.users).astype(np.int32)

    def only(self, users: SmallInts) -> Pins:
        """The same of a demand with only `users` [n], in that order."""
        return replace(self, users=self.users[users])


def read_user_ids(path: Path, progress: Progress | None = None) -> list[str]:
    """The user ids of a file, one a line (.gz: compressed), each once. progress: called with (bytes read, in all).

    Raises NotFound without the file, InvalidArgument naming the line of what is no user id, and for more than MAX_PINS or
    no users.
    """
    found: dict[str, None] = {}
    for number, line in lines(path, MAX_USER_ID_BYTES, progress):
        if not line:
            raise InvalidArgument(f"{path}:{number}: empty line", field="pin")
        try:
            found[line.decode()] = None
        except UnicodeDecodeError:
            raise InvalidArgument(f"{path}:{number}: not UTF-8", field="pin") from None
        if len(found) > MAX_PINS:
            raise InvalidArgument(f"{path} names more than {MAX_PINS} users", field="pin")
    if not found:
        raise InvalidArgument(f"{path} names no user", field="pin")
    return list(found)
