"""The gRPC server around one engine: what listens where, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import socket
import time
from types import ModuleType
from typing import Any

import grpc

from mtserve.config import HistoryConfig, ServerConfig
from mtserve.errors import InvalidArgument
from mtserve.proto.v1 import ranking_pb2 as pb
from mtserve.proto.v1 import ranking_pb2_grpc
from mtserve.server.backend import Backend
from mtserve.server.blocking import Blocking
from mtserve.server.convert import Limits
from mtserve.server.gate import Gate
from mtserve.server.prometheus import MetricsServer
from mtserve.server.service import RankingService
from mtserve.types import Clock

SERVICE = pb.DESCRIPTOR.services_by_name["Ranking"].full_name
READ_THREADS, WRITE_THREADS, MAX_WRITES = 8, 32, 4096
FLUSH_SECONDS = 0.5  # for answers on their way out; health watchers, which never end, are cut after it

log = logging.getLogger("mtserve.server")


class RankingServer:
    """Serves `engine` from `start` to `stop`; make and use it on one event loop. `clock` must be the engine's."""

    def __init__(
        self,
        engine: Backend,
        config: ServerConfig,
        *,
        max_append: int = HistoryConfig.max_append,
        clock: Clock = time.time,
    ) -> None:
        self._engine = engine
        self._config = config
        self._gate = Gate(engine.metrics)
        # Apart, so that scores never wait behind appends that wait for the disk; many threads
        # for these, because appends that wait together share one sync.
        self._reads = Blocking("reads", threads=READ_THREADS, limit=engine.config.max_queue)
        self._writes = Blocking("writes", threads=WRITE_THREADS, limit=MAX_WRITES)
        self._metrics: MetricsServer | None = None
        self._health: Any = None
        limits = Limits(candidates=engine.config.max_candidates, behaviours=max_append)
        self._service = RankingService(
            engine,
            limits,
            max_batch=config.max_batch,
            gate=self._gate,
            reads=self._reads,
            writes=self._writes,
            clock=clock,
        )
        self._server = grpc.aio.server(options=_options(config))
        ranking_pb2_grpc.add_RankingServicer_to_server(self._service, self._server)

    async def start(self) -> str:
        """Listen and return "HOST:PORT". Raises InvalidArgument when an address is taken or not ours."""
        host = self._config.host
        port = _bind(self._server, host, self._config.port)
        if self._config.metrics_port:
            self._metrics = MetricsServer(self._engine.metrics, host, self._config.metrics_port)
            log.info("metrics at http://%s/metrics", _join(host, self._metrics.port))
        self._add_reflection()
        await self._add_health()
        await self._server.start()
        return _join(host, port)

    async def stop(self, drain_s: float | None = None) -> bool:
        """Refuse new calls, let running ones and the engine finish within `drain_s`; True when all did.

        Calls still running then are cancelled. The engine itself stays open.
        """
        end = time.monotonic() + (self._config.drain_seconds if drain_s is None else drain_s)
        self._gate.close()
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        done = await self._gate.idle(_left(end))
        if not done:
            log.warning("%d calls are cancelled: they ran past the drain time", self._gate.running)
        drained = await asyncio.to_thread(self._engine.drain, _left(end))
        await self._server.stop(FLUSH_SECONDS if done else 0)
        await asyncio.to_thread(self._release)
        return done and drained

    async def abandon(self) -> None:
        """Release what a failed `start` had taken."""
        await self._server.stop(0)
        self._release()

    def _release(self) -> None:
        self._reads.close()
        self._writes.close()
        if self._metrics is not None:
            self._metrics.close()

    async def _add_health(self) -> None:
        health = _optional("grpc_health.v1.health", "grpcio-health-checking")
        if health is None:
            return
        stubs = importlib.import_module("grpc_health.v1.health_pb2")
        handlers = importlib.import_module("grpc_health.v1.health_pb2_grpc")
        self._health = health.aio.HealthServicer()
        handlers.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", SERVICE):
            await self._health.set(name, stubs.HealthCheckResponse.SERVING)

    def _add_reflection(self) -> None:
        reflection = _optional("grpc_reflection.v1alpha.reflection", "grpcio-reflection")
        if reflection is not None:
            names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)


def _optional(name: str, package: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        log.warning("%s is not installed: the server runs without it", package)
        return None


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    size = config.max_message_mib << 20
    return [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        ("grpc.so_reuseport", 0),  # a second server on our port must fail, not take half of the calls
    ]


def _bind(server: Any, host: str, port: int) -> int:
    """The port that `server` got. gRPC's own error does not say why, so a plain socket is asked."""
    with contextlib.suppress(RuntimeError):
        bound = int(server.add_insecure_port(_join(host, port)))
        if bound:
            return bound
    raise InvalidArgument(f"cannot listen on {_join(host, port)}: {_why_not(host, port)}", field="port")


def _why_not(host: str, port: int) -> str:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return "the address was taken a moment ago"


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _left(end: float) -> float:
    return max(0.0, end - time.monotonic())
