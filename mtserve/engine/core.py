"""What the loop owns: queue, tiers, planner, runner. One thread calls it, and nobody else."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.cache.index import TieredIndex
from mtserve.config import EngineConfig
from mtserve.engine import setup
from mtserve.engine.answers import Answers
from mtserve.engine.batch import BatchPlan, EarlyLayers
from mtserve.engine.flight import Flight
from mtserve.engine.footprint import packed_format
from mtserve.engine.job import Job
from mtserve.engine.known_costs import known_costs
from mtserve.engine.memory import Memory
from mtserve.engine.onload import MAX_LOADS
from mtserve.engine.pace import Pace
from mtserve.engine.planner import Planner
from mtserve.engine.restoring import Restored
from mtserve.engine.runner import BatchRunner, Done
from mtserve.engine.runners import make_runner, max_prefix
from mtserve.engine.scheduler import Scheduler, Slot
from mtserve.engine.sequence import SequenceBuilder, UserSequence
from mtserve.engine.stopwatch import Stopwatch
from mtserve.engine.tiers import Reservation, Tiers
from mtserve.engine.unpackers import make_unpacker
from mtserve.errors import FailedPrecondition, InvalidArgument
from mtserve.kernels.page_write.rounding import FP8, LARGEST_FP8
from mtserve.metrics import Metrics
from mtserve.model.ranking import RankingModel
from mtserve.model.state_bound import state_bound
from mtserve.model.weights import fingerprint
from mtserve.restore.costs import Costs
from mtserve.transfer.chaos import Chaos
from mtserve.transfer.mover import Fault, Unpacker
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
        self._pace = Pace()
        self.stopwatch = Stopwatch()
        self._answers = Answers(metrics, clock, self.invalidate)
        self._flight: Flight | None = None
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
            self._install(model)
            self._restore_by(costs)
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
        return Tiers(index, mover, memory.footprint, config, self._metrics, self._clock, max_prefix(model))

    def _install(self, model: RankingModel) -> None:
        if model.device != self.device or model.dtype != self.dtype:
            model = copy.deepcopy(model).to(self.device, self.dtype)
        self._check_range(model)
        digest = fingerprint(model)
        key = f"{digest} {self.dtype} {self._shape.dtype} {self._shape.sizes}"
        builder = SequenceBuilder(model.config, model.schema, key)
        planner, runner = Planner(model, self.config.page_tokens), self._make_runner(model)
        unpacker = self._make_unpacker(model)
        # All or nothing: what the weights of one model packed, those of another would unpack to wrong states.
        self.model, self.fingerprint, self.builder = model, digest, builder
        self._no_logits = np.empty((0, len(model.config.tasks)), dtype=np.float32)
        self._planner, self._runner = planner, runner
        if unpacker is not None and self.tiers is not None:
            self.tiers.unpack_by(unpacker)

    def _check_range(self, model: RankingModel) -> None:
        """Raises InvalidArgument for weights whose K and V the pages may not be able to hold."""
        if self.memory is None or self._shape.dtype != FP8:
            return
        bound = state_bound(model)
        if not bound <= LARGEST_FP8:
            raise InvalidArgument(
                f"this model's K and V may reach {bound:.4g}, and 'fp8' holds no more than {LARGEST_FP8:g}",
                field="gpu_format",
            )

    def _restore_by(self, costs: Costs | None) -> None:
        """Let batches decide how states come back, where anything is known of what that costs."""
        config, model = self.config, self.model.config
        if self.tiers is None or self.memory is None or not self.memory.arena.ready or config.restore != "auto":
            return
        if costs is None and self.kernels == "cuda":
            costs = known_costs(
                self._runner, self._planner, self.builder, self.tiers.mover, self.model, config, self.kernels,
                host_pages=self.memory.arena.ready,
            )  # fmt: skip
        if costs is not None:
            self.tiers.restore_by(costs, frozen_sees_all=model.static_attention == "full")

    def _make_runner(self, model: RankingModel) -> BatchRunner:
        if self.memory is None:
            return make_runner(model, self.config, self.kernels, None)
        return make_runner(model, self.config, self.kernels, self.memory.pool, self.memory.packed)

    def _make_unpacker(self, model: RankingModel) -> Unpacker | None:
        if self.memory is None or self.memory.packed is None:
            return None
        return make_unpacker(self.kernels, self.memory.packed, self.memory.pool, model)

    def admit(self, job: Job) -> None:
        """Queue `job`. Raises ResourceExhausted when the queue is full."""
        if job.replaces is not None and (self.tiers is None or not self.tiers.holds(job.replaces)):
            job.future.cancel()
            return
        if job.sequence.seed != self.builder.seed:  # the model was replaced after the request was made
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
        idle = self._flight is None
        slots = self.scheduler.take(self._cached, self._spare, self._restorable, idle=idle)
        launched = self._launch(slots) if slots else None
        lap("planning")
        try:
            if idle and self._restores:
                progress |= self._onload()  # what the batch that was to come first has left
                lap("copies")
            landed = self.land()
        finally:
            self._flight = launched
        if not self._runner.overlaps:
            self.land()
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
        if self._flight is None and self._restores:
            return ended > 0
        self._onload()
        return self.tiers.finish() + ended > 0

    @property
    def _restores(self) -> bool:
        return self.tiers is not None and self.tiers.restoring is not None

    def _onload(self) -> bool:
        return self.tiers is not None and self.tiers.onload(self.scheduler.head())

    def _cached(self, job: Job) -> int | None:
        return 0 if self.tiers is None else self.tiers.cached(job)

    def _spare(self, job: Job) -> bool:
        """Whether `job`, which must wait, may rather be encoded whole."""
        return self.tiers is not None and self.tiers.spare(job)

    def _restorable(self, job: Job) -> int | None:
        return None if self.tiers is None else self.tiers.restorable(job)

    def _launch(self, slots: Sequence[Slot]) -> Flight | None:
        """Reserve, plan and start a batch; None when that failed, and its requests with it."""
        began = self._clock()
        reservation: Reservation | None = None
        parts = [slot for slot in slots if slot.partial]
        try:
            if self.tiers is not None and slots[0].keep:
                reservation = self.tiers.reserve(slots)
            self._metrics.count("spare_requests_total", sum(len(slot.jobs) for slot in slots if not slot.keep))
            early = self._start_early(slots, reservation)
            plan = self._planner.plan(slots, reservation, self._runner.room)
            # A part that found no pages was planned whole: its jobs, which `take` left queued, are answered now.
            self.scheduler.remove([job for slot in parts if not slot.partial for job in slot.jobs])
            # Nothing to encode and nothing to score: a prefetch that found all of its states.
            arrivals = None if reservation is None else reservation.arrivals
            launched = self.stopwatch.lap("planning")
            pending = self._runner.start(plan, arrivals, early) if plan.tokens else Done(self._no_logits)
            self.stopwatch.lap("planning" if self._runner.overlaps else "device")
            return Flight(slots, reservation, plan, pending, began, launched)
        except Exception as error:
            log.exception("a batch of %d users failed", len(slots))
            try:
                self._runner.settle()  # what it had begun may still write its pages
            finally:
                self._fail(slots, reservation, error)
            return None

    def _start_early(self, slots: Sequence[Slot], reservation: Reservation | None) -> EarlyLayers | None:
        """Plan and start the layers of a batch that come before those that are loaded, where there are both."""
        restored = None if reservation is None else reservation.restored
        if reservation is None or restored is None or not restored.loads or not restored.choice.first_layer:
            return None
        before = reservation.early([slot.user_id for slot in slots])
        plan = self._planner.plan(slots, before, self._runner.early_room)
        early = EarlyLayers(plan, restored.choice.first_layer)
        self._runner.start_early(early)
        return early

    def land(self) -> bool:
        """Wait for the batch under way and answer it; False when there is none."""
        flight, self._flight = self._flight, None
        if flight is None:
            return False
        try:
            self.stopwatch.lap("answers")
            logits = flight.pending.result()
            self.stopwatch.landed(flight.launched, self.stopwatch.lap("device"))
            waited = flight.pending.waited()
        except Exception as error:
            log.exception("a batch of %d users failed", len(flight.slots))
            self._fail(flight.slots, flight.reservation, error)
            return True
        now = self._clock()
        seconds = now - flight.began
        restored = None if flight.reservation is None else flight.reservation.restored
        # The link's time says nothing of what a token takes.
        self._pace.landed(flight.began, now, 0 if restored is not None and restored.loads else flight.plan.tokens)
        try:
            self._commit(flight.slots, flight.reservation, flight.plan, logits, seconds)
        except Exception as error:  # ours, or the device's end: the loop stops, but nobody waits for ever
            for job in [job for slot in flight.slots for job in slot.jobs]:
                job.fail(error)
            raise
        self._note_landed(waited, restored, seconds)  # which nobody has to wait for
        return True

    def _note_landed(self, waited: dict[int, float], restored: Restored | None, seconds: float) -> None:
        """Count how long a batch's layers waited for loads, and hold what it took to what was predicted."""
        if waited:
            groups = [("load_wait_seconds_total", each, str(group)) for group, each in enumerate(waited.values())]
            self._metrics.count_many((("batches_over_loads_total", 1, ""), *groups))
        if restored is not None and self.tiers is not None:
            self.tiers.restored(restored, seconds)

    def _commit(
        self,
        slots: Sequence[Slot],
        reservation: Reservation | None,
        plan: BatchPlan,
        logits: npt.NDArray[np.float32],
        seconds: float,
    ) -> None:
        """Make the new states findable and answer."""
        spoiled: list[str] = []
        if self.tiers is not None and reservation is not None:
            spoiled = self.tiers.release(reservation, slots, success=True)
        cached = [0] * len(slots) if reservation is None else reservation.cached.tolist()
        for slot, tokens in zip(slots, cached, strict=True):
            if slot.user_id in spoiled:
                self._try_again(slot)
                continue
            for job in slot.jobs:
                job.found(tokens)
        self._forget_again([slot for slot in slots if slot.user_id not in spoiled])
        self._answers.give(plan, logits, self.model.config.tasks, seconds, without=spoiled)

    def _try_again(self, slot: Slot) -> None:
        """A load failed under the batch: what it computed of this user is void."""
        for job in slot.jobs:
            job.loads, job.loaded_from = MAX_LOADS, -1  # encode instead
        if not slot.partial:  # the jobs of a part are still queued
            self.scheduler.put_back(slot.jobs)

    def _fail(self, slots: Sequence[Slot], reservation: Reservation | None, error: Exception) -> None:
        """A crashed step fails its requests and leaks no page."""
        if self.tiers is not None and reservation is not None:
            self.tiers.release(reservation, slots, success=False)
        jobs = [job for slot in slots for job in slot.jobs]
        self.scheduler.remove(jobs)
        for job in jobs:
            if job.fail(error):
                self._metrics.count("failed_total")

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
        under_way = [] if self._flight is None else [job for slot in self._flight.slots for job in slot.jobs]
        if any(job.user_id == user_id for job in (*self.scheduler.jobs(), *under_way)):
            self._forgotten.add(user_id)

    def _forget_again(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.user_id in self._forgotten and not slot.partial:  # parts are what the answer is made from
                self._forgotten.discard(slot.user_id)
                self.forget(slot.user_id)

    def replace_model(self, model: RankingModel) -> None:
        """Serve other weights of the same configuration from the next batch on. States of the old one are never used again."""
        if dataclasses.replace(model.config, name=self.model.config.name) != self.model.config:
            raise FailedPrecondition("its configuration differs from the served model's", field="model")
        if model.schema != self.model.schema:
            raise FailedPrecondition("its feature schema differs from the served model's", field="model")
        self.land()
        self._install(model)
        self.invalidate(None)
        for job in self.scheduler.jobs():
            job.sequence = self._rebuilt(job.sequence)
            job.found_gpu, job.loads, job.loaded_from = -1, 0, -1

    def _rebuilt(self, sequence: UserSequence) -> UserSequence:
        """`sequence` under the present model; its cut depends on configuration that both models share."""
        history = History(sequence.features, sequence.cut.start, sequence.kept)
        return self.builder.build(sequence.user_id, history)

    def busy(self) -> bool:
        """Whether requests wait or copies are under way."""
        return len(self.scheduler) > 0 or self._flight is not None or (self.tiers is not None and self.tiers.busy())

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
            "model": {"name": self.model.config.name, "fingerprint": self.fingerprint},
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
            "runner": self._runner.stats(),
            "loop_seconds": dict(self.stopwatch.seconds),
            "batch_seconds": self.stopwatch.batch_s,
        }

    def close(self, error: Exception) -> None:
        """Answer what still waits with `error` and let the batch and every copy under way end."""
        try:
            self.land()
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
