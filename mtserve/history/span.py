"""Which behaviours of a user are kept, and what may follow them: the rules all stores share."""

from __future__ import annotations

from dataclasses import dataclass

from mtserve.errors import FailedPrecondition, InvalidArgument, NotFound
from mtserve.types import Rows


@dataclass(frozen=True)
class Span:
    """A user's behaviours [first, position); `last_ms` is the newest one's time.

    `floor_ms` is the time of the last dropped row (first - 1), 0 when none was dropped:
    what times may not fall below when every kept row is gone.
    """

    first: int = 0
    position: int = 0
    floor_ms: int = 0
    last_ms: int = 0

    def admit(self, rows: Rows, position: int | None) -> None:
        """Refuse `rows`, themselves in order, unless they continue this span at `position`."""
        if position is not None and position != self.position:
            kind = "a gap" if position > self.position else "an overlap"
            raise FailedPrecondition(
                f"{position} is {kind}: the server's history ends at position {self.position}",
                field="position",
                position=self.position,
            )
        if len(rows) and (start := int(rows["time_ms"][0])) < self.last_ms:
            raise InvalidArgument(
                f"{start} is before the previous behaviour's {self.last_ms}; times must not decrease",
                field="behaviours[0].time_ms",
            )

    def grown(self, rows: Rows) -> Span:
        """This span after `rows`."""
        if not len(rows):
            return self
        return Span(self.first, self.position + len(rows), self.floor_ms, int(rows["time_ms"][-1]))

    def check_end(self, position: int) -> None:
        """Refuse a `position` after the server's."""
        if position > self.position:
            raise FailedPrecondition(
                f"{position} is past the server's position {self.position}", field="position", position=self.position
            )

    def check_cut(self, position: int) -> None:
        """Refuse to truncate at a `position` that is past the end or before the first kept row."""
        self.check_end(position)
        if position < self.first:
            raise FailedPrecondition(
                f"{position} is before the first kept behaviour; behaviours {self.first} to {self.position} are kept. "
                "To correct older ones, delete the user and put the whole history again",
                field="position",
                position=self.position,
            )


def unknown(user_id: str) -> NotFound:
    return NotFound(f"{user_id!r} is not known", field="user_id")


def no_rows(user_id: str) -> NotFound:
    """The error of an empty append, which creates nobody."""
    return NotFound(f"{user_id!r} is not known and an empty append does not create it", field="user_id")
