"""The one table that turns exceptions into gRPC status codes, and back for the client."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import grpc

from mtserve import errors

FIELD_KEY = "mtserve-field"
POSITION_KEY = "mtserve-position"
MAX_MESSAGE = 2000  # characters; status and trailing metadata must fit one HTTP/2 header block (8 KiB)
MAX_FIELD = 256

# Order matters to `to_error` alone: of the classes with one code, the first answers for it.
CODES: dict[type[errors.MtserveError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.CorruptState: grpc.StatusCode.DATA_LOSS,
    errors.MtserveError: grpc.StatusCode.INTERNAL,
    errors.TransferFailed: grpc.StatusCode.INTERNAL,
}
_CLASSES = {code: kind for kind, code in reversed(CODES.items())}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}

log = logging.getLogger("mtserve.server")


@dataclass(frozen=True)
class Status:
    """What a failed call says: `position` is the server's history position, -1 where none applies."""

    code: grpc.StatusCode
    message: str
    field: str = ""
    position: int = -1

    @property
    def number(self) -> int:
        """The code's number in the gRPC protocol."""
        return int(self.code.value[0])

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Trailing metadata; values are printable ASCII, other characters escaped."""
        pairs = []
        if self.field:
            pairs.append((FIELD_KEY, _printable(self.field)[:MAX_FIELD]))
        if self.position >= 0:
            pairs.append((POSITION_KEY, str(self.position)))
        return tuple(pairs)


def of(error: BaseException) -> Status:
    """The status of `error`. One that mtserve did not raise on purpose is logged and says nothing of its inside."""
    for kind in type(error).__mro__:
        if kind in CODES:
            position = getattr(error, "position", -1)
            return Status(CODES[kind], str(error)[:MAX_MESSAGE], getattr(error, "field", ""), position)
    log.error("unexpected error while answering", exc_info=error)
    return Status(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")


def to_error(status: Status) -> errors.MtserveError:
    """The exception that `of` would turn into `status`: MtserveError itself where no class owns the code."""
    kind = _CLASSES.get(status.code, errors.MtserveError)
    message = status.message.removeprefix(f"{status.field}: ")
    if kind is errors.FailedPrecondition:
        return errors.FailedPrecondition(message, field=status.field, position=status.position)
    return kind(message, field=status.field)


def code_of(number: int) -> grpc.StatusCode:
    """The status code with this number; UNKNOWN for one that gRPC does not define."""
    return _BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")
