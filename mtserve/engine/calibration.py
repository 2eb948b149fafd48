"""Measures what restoring costs on this machine, once, before the engine serves.

    link     copies from the arena to the pool, in pieces of several sizes that lie anywhere, as the mover makes them
    layers   a few synthetic batches through the runner, each RUNS times after some that compile and capture
    unpack   the mover's unpacker on few and on many pages

Medians count. No index may have given pages out yet: the pool's are overwritten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mtserve import __version__
from mtserve.config import EngineConfig
from mtserve.engine.forward.planner import Planner
from mtserve.engine.forward.runner import BatchRunner
from mtserve.engine.queue.filling import Slot
from mtserve.engine.request.job import make_job
from mtserve.engine.request.sequence import SequenceBuilder
from mtserve.engine.tiers.tiers import Reservation
from mtserve.kernels.cuda.driver import current_context
from mtserve.kernels.cuda.queue import DriverQueue
from mtserve.model.ranking import RankingModel
from mtserve.restore.cache import CostKey
from mtserve.restore.costs import Costs
from mtserve.restore.fit import fit_nonnegative
from mtserve.transfer.mover import Mover
from mtserve.types import Clock, History

log = logging.getLogger(__name__)

RUNS, WARM_UP = 3, 4  # the runner compiles, and captures a graph, meanwhile
UNIT_TOKENS = {"cuda": 64, "cpu": 2}  # of the shapes below
LINK_BYTES = 64 << 20  # copied once a size: 1.2 ms of PCIe 5 x16
LINK_PIECES = 256
LARGEST_PIECE_PAGES = 16
UNPACKED_PAGES = 64
DRIVER_FACTS = Path("/proc/driver/nvidia/version")


class BatchShape(NamedTuple):
    """Of each of `users` users `cached` tokens have pages, `delta` and `candidates` are rows."""

    users: int
    cached: int
    delta: int
    candidates: int


# In units: few rows, many; each with few keys to see and with many.
SHAPES = (
    BatchShape(1, 0, 1, 1),
    BatchShape(1, 63, 1, 3),
    BatchShape(4, 0, 7, 1),
    BatchShape(8, 62, 2, 4),
    BatchShape(2, 0, 63, 1),
    BatchShape(16, 0, 7, 1),
)


class Sample(NamedTuple):
    """One batch: its rows, the keys they see; seconds that planning it took, and from there on until `start` had
    returned, and until its result was there.
    """

    rows: int
    pairs: int
    plan_s: float
    start_s: float
    total_s: float


def calibrate(
    runner: BatchRunner, planner: Planner, builder: SequenceBuilder, mover: Mover, model: RankingModel,
    config: EngineConfig, *, host_pages: int, clock: Clock = time.perf_counter,
) -> Costs:  # fmt: skip
    """Costs of batches of `model`, of loads by `mover` and of its unpacker.

    `host_pages`: pages of the arena that can be used by now; with none, nothing is known of the link. All that runs here
    counts in the runner's statistics, and a runner that captures graphs does so for each of the few batches.
    """
    began = time.perf_counter()
    load_s, link = _measure_link(mover, host_pages, clock) if host_pages else (0.0, ())
    unpack_s = _measure_unpacking(mover, config.page_tokens, model.device, clock)
    trial = _Trial(runner, planner, builder, config, len(mover.pool), clock)
    samples = [trial.run(shape) for shape in batch_shapes(builder, config, len(mover.pool), model.device)]
    launch_s = min(sample.start_s for sample in samples) if runner.overlaps else 0.0
    layer_s, row_s, pair_s = _fit(samples, launch_s, model.config.layers)
    plan_s, plan_row_s = _fit_planning(samples)
    if config.poison_pages:
        mover.poison(np.arange(len(mover.pool), dtype=np.int32))
    runner.settle()
    costs = Costs(link, load_s, plan_s + launch_s, layer_s, row_s, pair_s, unpack_s, plan_row_s)
    log.info("calibrated in %.2f s: %s", time.perf_counter() - began, costs)
    return costs


def cost_key(
    builder: SequenceBuilder, mover: Mover, model: RankingModel, config: EngineConfig, kernels: str, *, host_pages: int
) -> CostKey:
    """What `calibrate`'s result depends on, for keeping it from start to start."""
    shape, cuda = model.config, model.device.type == "cuda"
    try:
        driver = DRIVER_FACTS.read_text(encoding="utf-8").partition("\n")[0] if cuda else ""
    except OSError:
        driver = ""
    return CostKey(
        gpu=torch.cuda.get_device_name(model.device) if cuda else "",
        software=f"mtserve {__version__}, torch {torch.__version__}, cuda {torch.version.cuda}, {driver}",
        kernels=f"{kernels}, graphs {config.graphs}, deterministic {config.deterministic}",
        layers=shape.layers, d=shape.d, heads=shape.heads, head_dim=shape.head_dim,
        dtype=str(model.dtype).removeprefix("torch."), page_tokens=config.page_tokens,
        format=states_format(config),
        batches=" ".join(map(str, (tuple(each) for each in batch_shapes(builder, config, len(mover.pool), model.device)))),
        link_bytes=_link_bytes(mover, host_pages),
    )  # fmt: skip


def states_format(config: EngineConfig) -> str:
    """What the tiers keep of a page, as keys of costs name it."""
    return config.host_format if config.gpu_format == "native" else f"{config.host_format} of {config.gpu_format}"


def batch_shapes(
    builder: SequenceBuilder, config: EngineConfig, pool_pages: int, device: torch.device
) -> tuple[BatchShape, ...]:
    """Those to be timed: the nearest to SHAPES that the model, the pool and the largest batch admit."""
    unit = UNIT_TOKENS[device.type]
    wanted = (BatchShape(shape[0], *(unit * n for n in shape[1:])) for shape in SHAPES)
    return tuple(dict.fromkeys(_fitted(shape, builder, config, pool_pages) for shape in wanted))


def _fitted(shape: BatchShape, builder: SequenceBuilder, config: EngineConfig, pool_pages: int) -> BatchShape:
    """The nearest that can be; one user is never too many."""
    user_tokens, page_tokens, most = len(builder.schema.user), config.page_tokens, config.max_batch_tokens
    users, cached, delta, candidates = shape
    longest = min(user_tokens + builder.config.max_history, pool_pages * page_tokens)
    candidates = min(candidates, config.max_candidates, most)
    delta = min(delta, longest, max(1, most - candidates))
    cached = min(cached, longest - delta)
    delta += max(0, user_tokens - cached - delta)  # the least that a prefix has
    pages = -(-(cached + delta) // page_tokens)
    users = min(users, config.max_batch_requests, pool_pages // pages, most // (delta + candidates))
    return BatchShape(max(1, users), cached, delta, candidates)


def _fit_planning(samples: list[Sample]) -> tuple[float, float]:
    """Seconds that planning a batch takes by itself and by row: the line through the smallest and the largest."""
    least, most = min(samples), max(samples)
    row_s = max(0.0, most.plan_s - least.plan_s) / max(1, most.rows - least.rows)
    return max(0.0, least.plan_s - least.rows * row_s), row_s


def _fit(samples: list[Sample], launch_s: float, layers: int) -> tuple[float, float, float]:
    """Seconds of a layer by itself, by row and by pair; least squares of the relative errors, none negative.

    What a batch does for its rows outside of the layers (embedding, heads) counts as theirs.
    """
    times = np.array([max(sample.total_s - launch_s, 1e-9) / layers for sample in samples])
    terms = np.array([(1.0, sample.rows, sample.pairs) for sample in samples]) / times[:, None]
    scale = terms.max(axis=0)  # rows and pairs lie decades apart
    layer_s, row_s, pair_s = fit_nonnegative(terms / scale, np.ones(len(times))) / scale
    return float(layer_s), float(row_s), float(pair_s)


class _Trial:
    """Runs synthetic batches. Their users share one history; each has pages of its own."""

    def __init__(
        self, runner: BatchRunner, planner: Planner, builder: SequenceBuilder, config: EngineConfig, pages: int,
        clock: Clock,
    ) -> None:  # fmt: skip
        self._runner, self._planner, self._builder, self._config = runner, planner, builder, config
        self._pages, self._clock = pages, clock

    def run(self, shape: BatchShape) -> Sample:
        """Medians of RUNS batches of `shape`, one of `batch_shapes`."""
        slots, reservation = self._slots(shape)
        found = [self._time(slots, reservation) for _ in range(WARM_UP + RUNS)][WARM_UP:]
        plan_s, start_s, total_s = (median(each[place] for each in found) for place in (2, 3, 4))
        return found[0]._replace(plan_s=plan_s, start_s=start_s, total_s=total_s)

    def _time(self, slots: list[Slot], reservation: Reservation) -> Sample:
        arrived = self._clock()
        plan = self._planner.plan(slots, reservation, self._runner.room)
        plan_s = self._clock() - arrived
        pairs = int(plan.layout.limit.sum(dtype=np.int64)) + plan.candidates  # each of which sees itself
        began = self._clock()
        pending = self._runner.start(plan)
        started = self._clock()
        pending.result()
        return Sample(plan.rows, pairs, plan_s, started - began, self._clock() - began)

    def _slots(self, shape: BatchShape) -> tuple[list[Slot], Reservation]:
        schema, page_tokens, prefix = self._builder.schema, self._config.page_tokens, shape.cached + shape.delta
        behaviours = np.zeros(prefix - len(schema.user), schema.behaviour_dtype)
        sequence = self._builder.build("", History(None, 0, behaviours))
        candidates = np.zeros(shape.candidates, schema.candidate_dtype)
        candidates["time_ms"] = -1
        job = make_job(sequence, candidates, Future(), 1.0, None)
        slots = [Slot(sequence, shape.cached, prefix, [job]) for _ in range(shape.users)]
        width = -(-prefix // page_tokens)
        pages = np.arange(shape.users * width, dtype=np.int32) % self._pages
        begin, end = (np.full(shape.users, tokens, dtype=np.int32) for tokens in (shape.cached, prefix))
        return slots, Reservation(-1, begin, end, pages.reshape(shape.users, width), len(pages))


def _link_bytes(mover: Mover, host_pages: int) -> int:
    """Bytes that are copied once a size of piece."""
    host_pages = min(host_pages, mover.chunk_pages or host_pages)  # no copy may cross into another chunk
    return min(host_pages * mover.pool[:1].nbytes, mover.pool.nbytes, LINK_BYTES)


def _measure_link(mover: Mover, host_pages: int, clock: Clock) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Seconds of the smallest copy by itself, and the link's rates; of copies as the mover makes them, past its jobs:
    nobody is told of these, and no fault that is meant for jobs hits them.
    """
    page_bytes, region = mover.pool[:1].nbytes, _link_bytes(mover, host_pages)
    layer_bytes = page_bytes // mover.pool.shape[1]
    copies = _copies(mover)
    alone_s = _median_s(partial(copies, np.zeros(1, dtype=np.int64), layer_bytes), clock)
    link = []
    for size in _piece_sizes(layer_bytes, page_bytes, region):
        count = min(region // size, LINK_PIECES)
        offsets = np.random.default_rng(0).permutation(count) * size
        took = _median_s(partial(copies, offsets, size), clock)
        # What every load waits for once is `load_s`; a copy as short as that has no rate to speak of.
        link.append((size, count * size / max(took - alone_s, took / 2, 1e-9)))
    return alone_s, tuple(link)


def _piece_sizes(layer_bytes: int, page_bytes: int, most: int) -> list[int]:
    """From one layer of a page to runs of pages, in steps of about 4."""
    sizes, size = {page_bytes}, layer_bytes
    while size < page_bytes:
        sizes.add(size)
        size *= 4
    sizes.update(page_bytes * pages for pages in (4, LARGEST_PIECE_PAGES))
    return sorted(size for size in sizes if size <= most)


def _copies(mover: Mover) -> Callable[[npt.NDArray[np.int64], int], None]:
    """What copies pieces of one size from the arena to the same offsets, in bytes, of the pool, and waits for them."""
    pool, arena = mover.pool, mover.arena
    if pool.is_cuda:
        with torch.cuda.device(pool.device):
            queue, stream = DriverQueue(current_context()), torch.cuda.Stream()

        def load(offsets: npt.NDArray[np.int64], size: int) -> None:
            sizes = np.full(len(offsets), size, dtype=np.int64)
            queue.copy_batch(offsets + pool.data_ptr(), offsets + arena.data_ptr(), sizes, stream.cuda_stream)
            ticket = queue.submit()
            queue.wait(ticket)
            error = queue.take_error(ticket)
            if error is not None:
                raise error
            stream.synchronize()

        return load
    target, source = (each.view(-1).view(torch.uint8) for each in (pool, arena))

    def copy(offsets: npt.NDArray[np.int64], size: int) -> None:
        for first in offsets.tolist():
            target[first : first + size] = source[first : first + size]

    return copy


def _measure_unpacking(mover: Mover, page_tokens: int, device: torch.device, clock: Clock) -> float:
    """Seconds of the device for a token and layer."""
    unpacker, layers = mover.unpacker, mover.pool.shape[1]
    if unpacker is None:
        return 0.0
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def unpack(pages: int) -> None:
        unpacker.unpack(np.arange(pages, dtype=np.int32), 0, layers, 0 if stream is None else stream.cuda_stream)
        if stream is not None:
            stream.synchronize()

    many = min(len(mover.pool), UNPACKED_PAGES)
    few = many // 8
    took = _median_s(partial(unpack, many), clock)
    if few:
        took -= _median_s(partial(unpack, few), clock)  # leaves what each more page takes
    return max(0.0, took) / ((many - few) * page_tokens * layers)


def _median_s(action: Callable[[], None], clock: Clock) -> float:
    """Of RUNS runs after one that does not count."""
    took = []
    for _ in range(1 + RUNS):
        began = clock()
        action()
        took.append(clock() - began)
    return median(took[1:])
