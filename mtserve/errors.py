"""Typed errors. Each names the field at fault and the limit it broke.

An assertion failing inside mtserve is our bug; one of these is the caller's to
handle. `mtserve.server.status` maps every class here to one gRPC code.
"""

from __future__ import annotations


class MtserveError(Exception):
    """Base of every error mtserve raises on purpose.

    `field` is the name of the offending field or resource, empty when none applies.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class InvalidArgument(MtserveError, ValueError):
    """The request itself is malformed; retrying it unchanged cannot succeed."""


class NotFound(MtserveError, KeyError):
    """The named user (or file) is not known here."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class FailedPrecondition(MtserveError):
    """The request does not fit the server's present state.

    `position` is the server's history position where that is what did not fit, else -1.
    """

    def __init__(self, message: str, *, field: str = "", position: int = -1) -> None:
        super().__init__(message, field=field)
        self.position = position


class ResourceExhausted(MtserveError):
    """A bounded resource (queue, memory, pinned pages) is full."""


class DeadlineExceeded(MtserveError, TimeoutError):
    """The deadline passed, or the work could not have met it."""


class Cancelled(MtserveError):
    """The caller cancelled the request."""


class Unavailable(MtserveError):
    """The engine is draining or closed; another replica may answer."""


class TransferFailed(MtserveError):
    """A copy between tiers failed; the states it carried are not used."""


class CorruptState(MtserveError):
    """A `check()` found a broken invariant, or a stored file does not verify."""
