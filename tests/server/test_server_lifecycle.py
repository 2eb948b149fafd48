"""Cancellation, deadlines, draining, signals and ports."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from server_harness import running

from mtserve.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from mtserve.proto.v1 import ranking_pb2 as pb
from mtserve.proto.v1.ranking_pb2_grpc import RankingStub
from mtserve.server.blocking import Blocking
from mtserve.server.client import Client, ScoreCall

ONE = {"item": [1]}
MESSAGE = pb.ScoreRequest(user_id="ann", candidates={"count": 1})


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.put_user("ann")
    engine.held.set()
    return engine


@pytest.fixture
def stub(engine: FakeEngine, serve: Callable[..., Any]) -> Iterator[RankingStub]:
    with grpc.insecure_channel(serve(engine).target) as channel:
        yield RankingStub(channel)


@pytest.mark.parametrize("batch", [False, True])
def test_a_cancelled_call_cancels_its_futures(engine: FakeEngine, stub: Any, eventually: Any, batch: bool) -> None:
    many = pb.ScoreBatchRequest(requests=[MESSAGE] * 3)
    call = stub.ScoreBatch.future(many) if batch else stub.Score.future(MESSAGE)
    eventually(lambda: len(engine.waiting) == (3 if batch else 1))
    call.cancel()
    eventually(lambda: all(future.cancelled() for _, future in engine.waiting))
    eventually(lambda: engine.metrics.value("answers_total", "CANCELLED") == 1)
    engine.release()


def test_many_cancelled_calls_leave_nobody_inside(engine: FakeEngine, serve: Any, eventually: Any) -> None:
    server = serve(engine)
    with grpc.insecure_channel(server.target) as channel:
        calls = [RankingStub(channel).Score.future(MESSAGE) for _ in range(200)]
        for number, call in enumerate(calls):
            if number % 3 == 0:
                eventually(lambda: engine.waiting)
            call.cancel()
        gate = server.server._gate
        eventually(lambda: gate.running == 0)
        eventually(lambda: all(future.cancelled() for _, future in engine.waiting))
    engine.release()


def test_a_call_cancelled_while_it_is_submitted_cancels_its_future(
    engine: FakeEngine, stub: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go, submit = threading.Event(), threading.Event(), engine.submit

    def slow_submit(request: Any) -> Any:
        entered.set()
        go.wait(10)
        return submit(request)

    monkeypatch.setattr(engine, "submit", slow_submit)
    call = stub.Score.future(MESSAGE)
    assert entered.wait(10)
    call.cancel()
    eventually(lambda: engine.metrics.value("answers_total", "CANCELLED") == 1)
    go.set()
    eventually(lambda: len(engine.waiting) == 1 and engine.waiting[0][1].cancelled())
    engine.release()


def test_a_request_the_engine_cancels_is_answered_so(engine: FakeEngine, stub: Any, eventually: Any) -> None:
    call = stub.Score.future(MESSAGE)
    eventually(lambda: len(engine.waiting) == 1)
    engine.waiting[0][1].cancel()
    error = call.exception(10)
    assert (error.code(), error.details()) == (grpc.StatusCode.CANCELLED, "the engine cancelled the request")
    engine.release()


@pytest.mark.parametrize(("timeout_s", "deadline_ms", "expected"), [(5.0, 2000, 2.0), (1.5, 3000, 1.5), (3.0, 0, 3.0)])
def test_the_earlier_deadline_reaches_the_engine(
    engine: FakeEngine, client: Client, timeout_s: float, deadline_ms: int, expected: float
) -> None:
    engine.held.clear()
    now = time.time()
    client.score("ann", ONE, timeout_s=timeout_s, deadline_ms=deadline_ms)
    client.score_batch([ScoreCall("ann", ONE, deadline_ms=deadline_ms)], timeout_s=timeout_s)
    for request in engine.requests:
        assert request.deadline is not None
        assert request.deadline - now == pytest.approx(expected, abs=0.5)


def test_no_deadline_is_none(engine: FakeEngine, stub: Any) -> None:
    engine.held.clear()
    stub.Score(MESSAGE)
    assert engine.requests[-1].deadline is None


def test_past_its_deadline_a_call_ends_and_its_future_too(engine: FakeEngine, client: Client, eventually: Any) -> None:
    with pytest.raises(DeadlineExceeded):
        client.score("ann", ONE, timeout_s=0.1)
    eventually(lambda: engine.waiting[0][1].cancelled())
    engine.release()


def test_a_deadline_that_passed_stops_the_append(engine: FakeEngine, serve: Callable[..., Any]) -> None:
    late = iter([0.0, 10.0])  # read when the call arrives and again before the append
    target = serve(engine, clock=lambda: next(late)).target
    with Client(target) as client, pytest.raises(DeadlineExceeded, match="nothing was stored"):
        client.score("ann", ONE, append={"time_ms": [1]}, deadline_ms=500)
    assert len(engine.histories["ann"]) == 0
    assert engine.metrics.value("deadline_exceeded_total") == 1


def test_drain_finishes_what_runs_and_refuses_what_comes(engine: FakeEngine, eventually: Any) -> None:
    with running(engine, drain_seconds=10) as server, grpc.insecure_channel(server.target) as channel:
        stub, health = RankingStub(channel), health_pb2_grpc.HealthStub(channel)
        ask = health_pb2.HealthCheckRequest(service="mtserve.v1.Ranking")
        assert health.Check(ask).status == health_pb2.HealthCheckResponse.SERVING
        call = stub.Score.future(MESSAGE)
        eventually(lambda: len(engine.waiting) == 1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(lambda: server.server._gate.closed)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Score(MESSAGE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in caught.value.details()
        assert engine.metrics.value("rejected_total", "draining") == 1
        assert health.Check(ask).status == health_pb2.HealthCheckResponse.NOT_SERVING
        engine.release()
        assert len(call.result(10).scores) == 3
        stopping.join(10)
        assert not stopping.is_alive()


def test_drain_cancels_what_runs_past_its_time(engine: FakeEngine, eventually: Any) -> None:
    with running(engine, drain_seconds=0.1) as server, grpc.insecure_channel(server.target) as channel:
        call = RankingStub(channel).Score.future(MESSAGE)
        eventually(lambda: len(engine.waiting) == 1)
        assert server.stop() is False
        assert call.exception(10) is not None
        eventually(lambda: engine.waiting[0][1].cancelled())


def test_reflection_lists_the_service(serve: Callable[..., Any], engine: FakeEngine) -> None:
    with grpc.insecure_channel(serve(engine).target) as channel:
        assert "mtserve.v1.Ranking" in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_a_taken_port_is_a_clear_error(engine: FakeEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(InvalidArgument, match=f"port: cannot listen on 127.0.0.1:{port}: Address already in use"),
            running(engine, port=port),
        ):
            pass


def test_two_servers_cannot_share_a_port(engine: FakeEngine) -> None:
    with running(engine) as first:
        port = int(first.target.rsplit(":", 1)[1])
        with pytest.raises(InvalidArgument, match="Address already in use"), running(engine, port=port):
            pass


async def _overfill(blocking: Blocking, started: threading.Event, go: threading.Event) -> int:
    def work() -> int:
        started.set()
        go.wait(10)
        return 7

    first = asyncio.create_task(blocking.call(work))
    await asyncio.to_thread(started.wait, 10)
    waiting = asyncio.create_task(blocking.call(work))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="slow: 2 calls are waiting already"):
        await blocking.call(work)
    waiting.cancel()  # never started: its place is free again at once
    await asyncio.sleep(0.01)
    third = asyncio.create_task(blocking.call(work))
    await asyncio.sleep(0)
    go.set()
    return await first + await third


def test_blocking_calls_are_bounded() -> None:
    blocking = Blocking("slow", threads=1, limit=2)
    assert asyncio.run(_overfill(blocking, threading.Event(), threading.Event())) == 14
    blocking.close()


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from fake_engine import FakeEngine
from mtserve.config import ServerConfig
from mtserve.server.lifecycle import run

class History:
    def close(self):
        print("history closed after engine", engine.closed, flush=True)

engine = FakeEngine()
engine.put_user("ann")
engine.held.set()
submit = engine.submit
engine.submit = lambda request: (submit(request), print("submitted", flush=True))[0]
drain = engine.drain
engine.drain = lambda timeout_s: (print("engine drains", flush=True), drain(timeout_s))[1]
import threading
threading.Thread(target=lambda: (sys.stdin.readline(), engine.release()), daemon=True).start()
run(engine, ServerConfig(port=0, metrics_port=0, drain_seconds=10), history=History())
print("left run", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_closes_and_exits_0(number: signal.Signals) -> None:
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            line = process.stdout.readline()
            assert line.startswith("listening on 127.0.0.1:")
            with grpc.insecure_channel(line.split()[-1]) as channel:
                call = RankingStub(channel).Score.future(MESSAGE)
                assert process.stdout.readline() == "submitted\n"
                process.send_signal(number)
                with Client(line.split()[-1]) as client:
                    _until_refused(client)
                process.stdin.write("release\n")
                process.stdin.flush()
                assert len(call.result(10).scores) == 3
            assert process.stdout.read() == "engine drains\nhistory closed after engine True\nleft run\n"
            assert process.wait(10) == 0
        finally:
            process.kill()


def _until_refused(client: Client) -> None:
    end = time.monotonic() + 5
    refusal = ""
    while not refusal and time.monotonic() < end:
        try:
            client.stats()
        except Unavailable as error:
            refusal = str(error)
    assert "draining" in refusal
