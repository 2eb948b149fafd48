"""The Ranking service: each RPC decodes, asks the engine, and encodes the answer or the status."""

from __future__ import annotations

import asyncio
import functools
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from mtserve.errors import Cancelled, DeadlineExceeded, InvalidArgument
from mtserve.proto.v1 import ranking_pb2 as pb
from mtserve.server import convert, status
from mtserve.server.backend import Backend
from mtserve.server.blocking import Blocking
from mtserve.server.convert import Converter, Limits
from mtserve.server.gate import Gate
from mtserve.types import Clock, Request, ScoreResult

Method = Callable[["RankingService", Any, float | None], Awaitable[Any]]


def rpc(method: Method) -> Callable[[RankingService, Any, Any], Awaitable[Any]]:
    """Make a gRPC handler of `method(request, seconds the caller still waits)`."""

    @functools.wraps(method)
    async def handler(service: RankingService, request: Any, context: Any) -> Any:
        try:
            with service.gate.admit():
                reply = await method(service, request, context.time_remaining())
        except asyncio.CancelledError:
            service.count_answer("CANCELLED")
            raise
        except Exception as error:
            failed = status.of(error)
        else:
            service.count_answer("OK")
            return reply
        service.count_answer(failed.code.name)
        return await context.abort(failed.code, failed.message, failed.metadata)

    return handler


class RankingService:
    """Implements `mtserve.v1.Ranking` on one event loop. `clock` must be the engine's."""

    def __init__(
        self,
        engine: Backend,
        limits: Limits,
        *,
        max_batch: int,
        gate: Gate,
        reads: Blocking,
        writes: Blocking,
        clock: Clock,
    ) -> None:
        self.gate = gate
        self._engine = engine
        self._convert = Converter(engine.schema, limits)
        self._max_batch = max_batch
        self._reads = reads
        self._writes = writes
        self._clock = clock

    @rpc
    async def Score(self, request: Any, remaining_s: float | None) -> pb.ScoreResponse:  # noqa: N802
        return await self._result(await self._submit(request, self._deadline(request, remaining_s)))

    @rpc
    async def ScoreBatch(self, request: Any, remaining_s: float | None) -> pb.ScoreBatchResponse:  # noqa: N802
        count = len(request.requests)
        if count > self._max_batch:
            raise InvalidArgument(f"{count} is above the limit of {self._max_batch}", field="requests")
        # One lock a user: FIFO, so that requests of one user reach the engine in the batch's order.
        turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        outcomes = (self._outcome(item, remaining_s, turns[item.user_id]) for item in request.requests)
        return pb.ScoreBatchResponse(outcomes=await asyncio.gather(*outcomes))

    @rpc
    async def PutUser(self, request: Any, remaining_s: float | None) -> pb.PositionResponse:  # noqa: N802
        user_id = convert.user_id(request.user_id)
        features = self._convert.features(request.features)
        history = self._convert.behaviours(request.history, "history") if request.HasField("history") else None
        position = await self._writes.call(self._engine.put_user, user_id, features, history)
        return pb.PositionResponse(position=position)

    @rpc
    async def Append(self, request: Any, remaining_s: float | None) -> pb.PositionResponse:  # noqa: N802
        user_id, position = convert.user_id(request.user_id), convert.position(request)
        rows = self._convert.behaviours(request.behaviours)
        append = functools.partial(self._engine.append, prefetch=request.prefetch)
        return pb.PositionResponse(position=await self._writes.call(append, user_id, rows, position))

    @rpc
    async def Truncate(self, request: Any, remaining_s: float | None) -> pb.PositionResponse:  # noqa: N802
        user_id, position = convert.user_id(request.user_id), convert.known_position(request.position)
        return pb.PositionResponse(position=await self._writes.call(self._engine.truncate, user_id, position))

    @rpc
    async def DeleteUser(self, request: Any, remaining_s: float | None) -> pb.DeleteUserResponse:  # noqa: N802
        existed = await self._writes.call(self._engine.delete_user, convert.user_id(request.user_id))
        return pb.DeleteUserResponse(existed=existed)

    @rpc
    async def Prefetch(self, request: Any, remaining_s: float | None) -> pb.PrefetchResponse:  # noqa: N802
        await self._reads.call(self._engine.prefetch, convert.user_id(request.user_id))
        return pb.PrefetchResponse()

    @rpc
    async def Invalidate(self, request: Any, remaining_s: float | None) -> pb.InvalidateResponse:  # noqa: N802
        if request.WhichOneof("target") is None or (request.WhichOneof("target") == "all" and not request.all):
            raise InvalidArgument("name a user_id, or say all", field="target")
        user_id = None if request.all else convert.user_id(request.user_id)
        return pb.InvalidateResponse(invalidated=await self._reads.call(self._engine.invalidate, user_id))

    @rpc
    async def Pin(self, request: Any, remaining_s: float | None) -> pb.PinResponse:  # noqa: N802
        return pb.PinResponse(pinned=await self._reads.call(self._engine.pin, list(request.user_ids)))

    @rpc
    async def Unpin(self, request: Any, remaining_s: float | None) -> pb.UnpinResponse:  # noqa: N802
        return pb.UnpinResponse(unpinned=await self._reads.call(self._engine.unpin, list(request.user_ids)))

    @rpc
    async def GetStats(self, request: Any, remaining_s: float | None) -> pb.GetStatsResponse:  # noqa: N802
        stats = await self._reads.call(self._engine.stats)
        return pb.GetStatsResponse(stats_json=json.dumps(stats), schema_json=self._engine.schema.to_json())

    def count_answer(self, code: str) -> None:
        self._engine.metrics.count("answers_total", label=code)

    async def _outcome(self, request: Any, remaining_s: float | None, turn: asyncio.Lock) -> pb.ScoreOutcome:
        try:
            deadline = self._deadline(request, remaining_s)
            async with turn:
                future = await self._submit(request, deadline)
            response = await self._result(future)
        except Exception as error:
            failed = status.of(error)
            self.count_answer(failed.code.name)
            return pb.ScoreOutcome(failure=convert.failure(failed))
        self.count_answer("OK")
        return pb.ScoreOutcome(response=response)

    def _deadline(self, request: Any, remaining_s: float | None) -> float | None:
        """The earlier of the message's and the call's deadline, on the engine's clock."""
        own = convert.deadline_seconds(request.deadline_ms)
        limits = [seconds for seconds in (own, remaining_s) if seconds is not None]
        return self._clock() + min(limits) if limits else None

    async def _submit(self, request: Any, deadline: float | None) -> Future[ScoreResult]:
        """Decode all of `request` before its append, which cannot be taken back; then queue it."""
        user_id, candidates = (
            convert.user_id(request.user_id),
            self._convert.candidates(request.candidates, request.context),
        )
        history = self._convert.history(request.history) if request.HasField("history") else None
        if request.HasField("append"):
            if history is not None:
                raise InvalidArgument("cannot go with history, which is not stored", field="append")
            await self._append_first(user_id, request.append, deadline)
        return await self._queue(Request(user_id, candidates, deadline, history))

    async def _queue(self, request: Request) -> Future[ScoreResult]:
        """Submit on a thread, for the history may have to be read; a caller gone by then takes the request along."""
        submitting = self._reads.start(self._engine.submit, request)
        try:
            return await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_result)
            raise

    async def _append_first(self, user_id: str, append: Any, deadline: float | None) -> None:
        position, rows = convert.position(append), self._convert.behaviours(append.behaviours, "append.behaviours")
        if deadline is not None and self._clock() >= deadline:
            self._engine.metrics.count("deadline_exceeded_total")
            raise DeadlineExceeded("passed before the append began; nothing was stored", field="deadline")
        await self._writes.call(self._engine.append, user_id, rows, position)

    async def _result(self, future: Future[ScoreResult]) -> pb.ScoreResponse:
        """Wait for the engine. When the caller goes away, so does the request."""
        try:
            return convert.response(await asyncio.wrap_future(future))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("the engine cancelled the request") from None


def _cancel_result(submitting: Future[Future[ScoreResult]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
