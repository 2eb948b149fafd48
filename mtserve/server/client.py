"""A blocking client of the Ranking service. Imports neither torch nor the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument, MtserveError
from mtserve.proto.v1 import ranking_pb2 as pb
from mtserve.proto.v1 import ranking_pb2_grpc
from mtserve.server import status, wire

Columns: TypeAlias = Mapping[str, Any]
"""Feature name to values: integers for a categorical feature, floats for a dense one, [rows] or [rows, width]."""


@dataclass(frozen=True)
class Scores:
    """`scores`: float32 [candidates, tasks], 0 to 1. gpu + host + encoded tokens == prefix tokens."""

    tasks: tuple[str, ...]
    scores: npt.NDArray[np.float32]
    position: int
    prefix_tokens: int
    gpu_tokens: int
    host_tokens: int
    encoded_tokens: int
    latency_s: float

    def task(self, name: str) -> npt.NDArray[np.float32]:
        """float32 [candidates] of one task. Raises InvalidArgument when the model has no such task."""
        if name not in self.tasks:
            raise InvalidArgument(f"{name!r} is not one of {', '.join(self.tasks)}", field="task")
        return self.scores[:, self.tasks.index(name)]


@dataclass(frozen=True)
class ScoreCall:
    """One Score. `features` and `history` go together: a whole history that the server does not store.

    `append`: behaviours added durably before scoring, at `append_position` unless that is None.
    """

    user_id: str
    candidates: Columns
    context: Columns = field(default_factory=dict)
    append: Columns | None = None
    append_position: int | None = None
    features: Columns = field(default_factory=dict)
    history: Columns | None = None
    deadline_ms: int = 0


class Client:
    """Calls the server at `target` ("host:port"). Thread-safe; close it, or use it as a context manager.

    `timeout_s` is every call's deadline unless the call brings its own; None waits for ever.
    Methods raise the errors of `mtserve.errors` that the server raised; `Unavailable` also when
    nothing listens at `target`, and MtserveError itself for errors internal to the server.
    """

    def __init__(self, target: str, timeout_s: float | None = 10.0, *, max_message_mib: int = 16) -> None:
        size = max_message_mib << 20
        limits = [("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)]
        self._channel = grpc.insecure_channel(target, options=limits)
        self._stub = ranking_pb2_grpc.RankingStub(self._channel)
        self._timeout_s = timeout_s

    def score(self, user_id: str, candidates: Columns, *, timeout_s: float | None = None, **options: Any) -> Scores:
        """Scores of `candidates`; `options` are the other fields of `ScoreCall`."""
        request = _score_request(ScoreCall(user_id, candidates, **options))
        return _scores(self._call(self._stub.Score, request, timeout_s))

    def score_batch(self, calls: Iterable[ScoreCall], *, timeout_s: float | None = None) -> list[Scores | MtserveError]:
        """Several Scores in one message; an entry that failed is its error, returned, not raised."""
        request = pb.ScoreBatchRequest(requests=[_score_request(call) for call in calls])
        return [_outcome(item) for item in self._call(self._stub.ScoreBatch, request, timeout_s).outcomes]

    def put_user(
        self,
        user_id: str,
        features: Columns | None = None,
        history: Columns | None = None,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """Set features (one value each) and, when given, replace the history; returns the position."""
        request = pb.PutUserRequest(user_id=user_id, features=wire.pack_single("features", features or {}))
        if history is not None:
            request.history.CopyFrom(wire.pack_rows("history", history))
        return int(self._call(self._stub.PutUser, request, timeout_s).position)

    def append(
        self,
        user_id: str,
        behaviours: Columns,
        position: int | None = None,
        *,
        prefetch: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """Add behaviours, durably; returns the position after them.

        `prefetch` hints that a Score of the user follows: the server begins with its states right away.
        Raises FailedPrecondition, with the server's `position`, when `position` is another one.
        """
        rows = wire.pack_rows("behaviours", behaviours)
        request = pb.AppendRequest(user_id=user_id, behaviours=rows, prefetch=prefetch)
        if position is not None:
            request.position = position
        return int(self._call(self._stub.Append, request, timeout_s).position)

    def truncate(self, user_id: str, position: int, *, timeout_s: float | None = None) -> int:
        """Drop the behaviours at and after `position`."""
        request = pb.TruncateRequest(user_id=user_id, position=position)
        return int(self._call(self._stub.Truncate, request, timeout_s).position)

    def delete_user(self, user_id: str, *, timeout_s: float | None = None) -> bool:
        """Forget a user; False when there was none."""
        return bool(self._call(self._stub.DeleteUser, pb.DeleteUserRequest(user_id=user_id), timeout_s).existed)

    def prefetch(self, user_id: str, *, timeout_s: float | None = None) -> None:
        """Start bringing a user's states to the GPU."""
        self._call(self._stub.Prefetch, pb.PrefetchRequest(user_id=user_id), timeout_s)

    def invalidate(self, user_id: str | None = None, *, timeout_s: float | None = None) -> int:
        """Drop the cached states of one user, or of all; returns how many users had some."""
        request = pb.InvalidateRequest(all=True) if user_id is None else pb.InvalidateRequest(user_id=user_id)
        return int(self._call(self._stub.Invalidate, request, timeout_s).invalidated)

    def pin(self, user_ids: Sequence[str], *, timeout_s: float | None = None) -> int:
        """Keep these users' states before others', known or not; returns how many were not pinned. At most 65536."""
        return int(self._call(self._stub.Pin, pb.PinRequest(user_ids=user_ids), timeout_s).pinned)

    def unpin(self, user_ids: Sequence[str], *, timeout_s: float | None = None) -> int:
        """Treat them like anybody again; returns how many were pinned."""
        return int(self._call(self._stub.Unpin, pb.UnpinRequest(user_ids=user_ids), timeout_s).unpinned)

    def stats(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """The engine's counters, nested by subject."""
        return dict(json.loads(self._call(self._stub.GetStats, pb.GetStatsRequest(), timeout_s).stats_json))

    def schema(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """The model's features: lists under "user", "behaviour" and "candidate"."""
        return dict(json.loads(self._call(self._stub.GetStats, pb.GetStatsRequest(), timeout_s).schema_json))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=self._timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise _error(error) from None


def _score_request(call: ScoreCall) -> pb.ScoreRequest:
    request = pb.ScoreRequest(
        user_id=call.user_id,
        candidates=wire.pack_rows("candidates", call.candidates),
        context=wire.pack_single("context", call.context),
        deadline_ms=call.deadline_ms,
    )
    if call.append is not None:
        request.append.behaviours.CopyFrom(wire.pack_rows("append.behaviours", call.append))
        if call.append_position is not None:
            request.append.position = call.append_position
    if call.history is not None:
        request.history.behaviours.CopyFrom(wire.pack_rows("history.behaviours", call.history))
        request.history.features.extend(wire.pack_single("features", call.features))
    elif call.features:
        raise InvalidArgument("needs history; stored features are set by put_user", field="features")
    return request


def _scores(message: pb.ScoreResponse) -> Scores:
    tasks = tuple(message.tasks)
    values = np.fromiter(message.scores, np.float32, len(message.scores))
    return Scores(
        tasks=tasks,
        scores=values.reshape(-1, len(tasks)),
        position=message.position,
        prefix_tokens=message.prefix_tokens,
        gpu_tokens=message.gpu_tokens,
        host_tokens=message.host_tokens,
        encoded_tokens=message.encoded_tokens,
        latency_s=message.latency_seconds,
    )


def _outcome(message: pb.ScoreOutcome) -> Scores | MtserveError:
    if message.WhichOneof("outcome") == "response":
        return _scores(message.response)
    failed = message.failure
    position = failed.position if failed.HasField("position") else -1
    return status.to_error(status.Status(status.code_of(failed.code), failed.message, failed.field, position))


def _error(error: Any) -> MtserveError:
    trailing = dict(error.trailing_metadata() or ())
    position = int(trailing.get(status.POSITION_KEY, -1))
    where = trailing.get(status.FIELD_KEY, "")
    return status.to_error(status.Status(error.code(), error.details() or "", where, position))
