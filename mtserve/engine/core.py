"""What the loop owns: queue, tiers, batches. One thread calls it, and nobody else."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from mtserve.cache.index import TieredIndex
from mtserve.config import EngineConfig
from mtserve.engine import setup
from mtserve.engine.batches import Batches
from mtserve.engine.forward.runners import max_prefix
from mtserve.engine.known_costs import known_costs
from mtserve.engine.memory import Memory
from mtserve.engine.queue.filling import Slot
from mtserve.engine.queue.pace import Pace
from mtserve.engine.queue.scheduler import Questions, Scheduler
from mtserve.engine.request.job import Job
from mtserve.engine.request.sequence import UserSequence
from mtserve.engine.served import Place, Served
from mtserve.engine.stopwatch import Stopwatch
from mtserve.engine.tiers.footprint import packed_format
from mtserve.engine.tiers.tiers import Tiers
from mtserve.errors import FailedPrecondition
from mtserve.metrics import Metrics
from mtserve.model.ranking import RankingModel
from mtserve.restore.costs import Costs
from mtserve.transfer.chaos import Chaos
from mtserve.transfer.mover import Fault
from mtserve.types import Clock, History

log = logging.getLogger(__name__)

LEFT_BEHIND: list[object] = []  # memory of closed engines that a stuck copy may still touch


class Core:
    """Everything between an admitted job and its answer."""

    def __init__(
        self,
        model: RankingModel,
        config: EngineConfig,
        metrics: Metrics,
        clock: Clock,
        fault: Fault | None = None,
        *,
        background: bool = False,
        costs: Costs | None = None,
    ) -> None:
        """`costs`: of restoring, calibrated on CUDA where not given; elsewhere batches then do not decide how states come
        back. `background`: the host tier may be smaller at first; whoever asks so calls `memory.grow`."""
        self.config = config
        chaos = setup.resolve_chaos(config, fault)
        self.device = setup.resolve_device(config.device)
        self.dtype = setup.resolve_dtype(config.dtype, self.device)
        self._metrics = metrics
        self._clock = clock
        self.kernels = setup.resolve_kernels(config, model.config, self.device, self.dtype)
        self._pace, self.stopwatch = Pace(), Stopwatch()
        self._forgotten: set[str] = set()  # deleted users with requests in the queue
        self._shape = setup.page_shape(model.config, config, self.dtype)
        self.scheduler = Scheduler(config, metrics, static_attention=model.config.static_attention)
        self.memory: Memory | None = None
        self.tiers: Tiers | None = None
        if config.cache == "on":
            packed = packed_format(model.config, config, self._shape)
            self.memory = Memory(config, self._shape, packed, self.device, chaos, background=background)
        try:
            if self.memory is not None:
                self.tiers = self._make_tiers(model, self.memory, fault, chaos)
            self._place = Place(config, self.device, self.dtype, self.kernels, self._shape, self.memory)
            self.batches = Batches(
                self._serve(model), self.scheduler, self.tiers, metrics, clock, self._pace, self.stopwatch,
                before_answers=self._forget_again, invalidate=self.invalidate,
            )  # fmt: skip
            if config.graphs == "ahead":
                self.served.runner.prepare()
            self._restore_by(costs)
            self._questions = Questions(lambda job: 0) if self.tiers is None else self.tiers.questions
        except Exception:
            if self.memory is not None:
                self.memory.close()  # nobody else will
            raise

    def _make_tiers(self, model: RankingModel, memory: Memory, fault: Fault | None, chaos: Chaos | None) -> Tiers:
        config = self.config
        index = TieredIndex(
            config.page_tokens, len(memory.pool), memory.arena.ready, config.policy,
            clock=self._clock, track_freed=config.poison_pages, pin_budget=config.pin_budget,
        )  # fmt: skip
        mover = setup.make_link(memory.link, memory.arena, self._clock, fault, chaos)
        return Tiers(index, mover, memory.footprint, config, self._metrics, self._clock, max_prefix(model), self._pace)

    @property
    def served(self) -> Served:
        """The model that the next batch is served with."""
        return self.batches.served

    def _serve(self, model: RankingModel) -> Served:
        """What serves `model` from now on."""
        served = self._place.serve(model)
        if served.unpacker is not None and self.tiers is not None:
            self.tiers.unpack_by(served.unpacker)
        return served

    def _restore_by(self, costs: Costs | None) -> None:
        """Let batches decide how states come back, where anything is known of what that costs."""
        config, served = self.config, self.served
        if self.tiers is None or self.memory is None or not self.memory.arena.ready or config.restore != "auto":
            return
        if costs is None and self.kernels == "cuda":
            costs = known_costs(
                served.runner, served.planner, served.builder, self.tiers.mover, served.model, config, self.kernels,
                host_pages=self.memory.arena.ready,
            )  # fmt: skip
        if costs is not None:
            self.tiers.restore_by(costs, frozen_sees_all=served.model.config.static_attention == "full")

    def admit(self, job: Job) -> None:
        """Queue `job`. Raises ResourceExhausted when the queue is full."""
        if job.replaces is not None and (self.tiers is None or not self.tiers.holds(job.replaces)):
            job.future.cancel()
            return
        if job.sequence.seed != self.served.builder.seed:  # the model was replaced after the request was made
            job.sequence = self._rebuilt(job.sequence)
        self.scheduler.add(job)

    def step(self) -> bool:
        """One turn of the loop; False when there was nothing to do.

        Where the runner overlaps, a batch is planned and launched while the one before it runs.
        """
        lap, now = self.stopwatch.lap, self._clock()
        lap("outside")
        self.scheduler.drop_hopeless(now, self._pace.token_s(now))
        progress = self._finish_copies(now)
        lap("copies")
        batches = self.batches
        idle = batches.flight is None
        slots = self.scheduler.take(*self._questions, idle=idle)
        launched = batches.launch(slots) if slots else None
        lap("planning")
        try:
            if idle and self._restores:
                progress |= self._onload()  # what the batch that was to come first has left
                lap("copies")
            landed = batches.land()
        finally:
            batches.flight = launched
        if not self.served.runner.overlaps:
            batches.land()
        lap("answers")
        if self.tiers is not None:
            self.tiers.write_back()
        self._metrics.set("queue_length", len(self.scheduler))
        lap("copies")
        return progress or bool(slots) or landed

    def _finish_copies(self, now: float) -> bool:
        """Publish the copies that ended, start the onloads that waiting requests need.

        While the device is idle a batch may decide for itself how its states come back: then it comes first.
        """
        if self.tiers is None:
            return False
        ended = self.tiers.finish()
        self.tiers.survey(self.scheduler.head(), self._pace.token_s(now))
        if self.batches.flight is None and self._restores:
            return ended > 0
        self._onload()
        return self.tiers.finish() + ended > 0

    @property
    def _restores(self) -> bool:
        return self.tiers is not None and self.tiers.restoring is not None

    def _onload(self) -> bool:
        return self.tiers is not None and self.tiers.onload(self.scheduler.head())

    def invalidate(self, user_id: str | None) -> int:
        """Forget the states of one user, or of all; returns how many users had any."""
        return 0 if self.tiers is None else self.tiers.invalidate(user_id)

    def pin(self, users: Sequence[str]) -> int:
        """Keep the states of these users before others'; returns how many were not pinned."""
        return 0 if self.tiers is None else self.tiers.pin(users)

    def unpin(self, users: Sequence[str]) -> int:
        """Treat them like anybody again; returns how many were pinned."""
        return 0 if self.tiers is None else self.tiers.unpin(users)

    def forget(self, user_id: str) -> None:
        """Forget a deleted user's states, and those that its last queued requests are yet to make."""
        self.invalidate(user_id)
        flight = self.batches.flight
        under_way = [] if flight is None else [job for slot in flight.slots for job in slot.jobs]
        if any(job.user_id == user_id for job in (*self.scheduler.jobs(), *under_way)):
            self._forgotten.add(user_id)

    def _forget_again(self, slots: Sequence[Slot]) -> None:
        for slot in slots if self._forgotten else ():
            if slot.user_id in self._forgotten and not slot.partial:  # parts are what the answer is made from
                self._forgotten.discard(slot.user_id)
                self.forget(slot.user_id)

    def replace_model(self, model: RankingModel) -> None:
        """Serve other weights of the same configuration from the next batch on. States of the old one are never used again."""
        before = self.served.model
        if dataclasses.replace(model.config, name=before.config.name) != before.config:
            raise FailedPrecondition("its configuration differs from the served model's", field="model")
        if model.schema != before.schema:
            raise FailedPrecondition("its feature schema differs from the served model's", field="model")
        self.batches.land()
        self.batches.served = self._serve(model)
        self.invalidate(None)
        for job in self.scheduler.jobs():
            job.sequence = self._rebuilt(job.sequence)
            job.found_gpu, job.loads, job.loaded_from = -1, 0, -1

    def _rebuilt(self, sequence: UserSequence) -> UserSequence:
        """`sequence` under the present model; its cut depends on configuration that both models share."""
        history = History(sequence.features, sequence.cut.start, sequence.kept)
        return self.served.builder.build(sequence.user_id, history)

    def busy(self) -> bool:
        """Whether requests wait or copies are under way."""
        return (
            len(self.scheduler) > 0 or self.batches.flight is not None or (self.tiers is not None and self.tiers.busy())
        )

    def due_in(self) -> float:
        """Seconds until there is something to do by itself; infinity when nothing is."""
        return math.inf if self.tiers is None else self.tiers.due_in()

    def check(self) -> None:
        """Raise when any structure of the loop is inconsistent."""
        if self.tiers is not None and self.memory is not None:
            self.tiers.check()
            self.memory.check(self.tiers.index.stats().host.total)

    def stats(self) -> dict[str, Any]:
        """JSON-able facts about the model, the queue, the tiers and the runner (since the model was installed)."""
        return {
            "model": {"name": self.served.model.config.name, "fingerprint": self.served.fingerprint},
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernels": self.kernels,
            "gpu_format": self.config.gpu_format,
            "page_bytes": self._shape.bytes,
            "page_tokens": self._shape.page_tokens,
            "queue_length": len(self.scheduler),
            "tiers": {} if self.tiers is None else self.tiers.stats(),
            "transfers": {} if self.tiers is None else self.tiers.transfers(),
            "restoring": {} if self.tiers is None else self.tiers.predictions(),
            "host_memory": {} if self.memory is None else self.memory.facts(),
            "runner": self.served.runner.stats(),
            "loop_seconds": dict(self.stopwatch.seconds),
            "batch_seconds": self.stopwatch.batch_s,
        }

    def close(self, error: Exception) -> None:
        """Answer what still waits with `error` and let the batch and every copy under way end."""
        try:
            self.batches.land()
        except Exception:
            log.exception("the last batch could not be answered")
        for job in self.scheduler.clear():
            job.fail(error)
        if self.tiers is None or self.memory is None:
            return
        self.memory.stop()
        settled = False
        try:
            settled = self.tiers.settle()
        finally:
            if not settled:  # memory that a copy may still touch stays as it is until the process ends
                log.error("closed with a copy between the tiers stuck")
                LEFT_BEHIND.append((self.memory, self.tiers.mover))
        if settled:
            self.memory.close()
