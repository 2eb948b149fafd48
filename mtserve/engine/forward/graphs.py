"""The runner for CUDA: the whole forward as one captured graph a bucket of rows, one copy each way a batch."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from itertools import groupby
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtserve.engine.forward.batch import BatchArrays, BatchPlan, BatchSize, EarlyLayers
from mtserve.engine.forward.gates import Gates, LayerWaits
from mtserve.engine.forward.graph_key import GraphKey, segments, usual_keys
from mtserve.engine.forward.heads import TaskHeads
from mtserve.engine.forward.metadata import Capacity, Metadata, bucket_rows
from mtserve.engine.forward.runner import check_rows
from mtserve.engine.forward.stack import Stack
from mtserve.engine.forward.tokens import TokenEmbedding
from mtserve.errors import MtserveError
from mtserve.kernels.cuda.driver import Event, OwnStream, current_context, use_context
from mtserve.kernels.cuda.graph import Graph, capture
from mtserve.kernels.host_copy.cuda import HostCopy
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.late_rows.triton import late_rows
from mtserve.model.ranking import RankingModel
from mtserve.transfer.cuda_mover import layer_groups
from mtserve.transfer.mover import Arrivals

log = logging.getLogger(__name__)

# Graphs kept at once; the least recently used goes first. A graph of 8 layers takes a few hundred KiB.
MAX_GRAPHS = 512
# Batches of a kind launched kernel by kernel before it is captured. In a trial capturing took as long as such a launch,
# 2 to 5 ms, and a replay without cache was as fast with 1 as with 3; with graphs never, a third as fast.
RUNS_BEFORE_CAPTURE = 3


@dataclass(frozen=True)
class Launched:
    """A batch on its way; its states are in their pages and its logits here when `done` has passed.

    `gates`: of a batch over loads, which noted when its layers' pages came.
    """

    logits: npt.NDArray[np.float32]
    done: Event
    gates: Gates | None

    def result(self) -> npt.NDArray[np.float32]:
        """float32 [candidates of the batch, tasks] logits; waits for them."""
        self.done.synchronize()
        return self.logits.copy()  # the pinned buffer and the event are another batch's after the next

    def waited(self) -> dict[int, float]:
        """First layer of each group that the batch waited for -> seconds; empty of a batch over no loads."""
        return self.gates.waited() if self.gates is not None else {}


class GraphRunner:
    """Executes plans with the CUDA kernels, as graphs once a kind of batch has come RUNS_BEFORE_CAPTURE times.

    `capture=False` launches kernel by kernel: the same results, slower.
    """

    overlaps = True

    def __init__(
        self, model: RankingModel, pool: torch.Tensor | None, page_tokens: int, *, rows: int, slots: int, width: int,
        capture: bool = True, deterministic: bool = False, packed: PackedPages | None = None,
    ) -> None:  # fmt: skip
        self._model, self._capture, self._keeps = model, capture, pool is not None
        self._layers = model.config.layers
        capacity = Capacity.of(model.schema, rows, slots, width)
        tasks = len(model.config.tasks)
        with torch.inference_mode(), torch.cuda.device(model.device):  # the caller's thread may have another
            self._embedding = TokenEmbedding(model, capacity.rows)
            self._stack = Stack(model, pool, page_tokens, capacity.rows, packed=packed, deterministic=deterministic)
            self._late = torch.zeros_like(self._stack.buffers.x)  # rows of a split batch that go on
            self._heads = TaskHeads(model)
            self._metadata, self._early = Metadata(capacity, model.device), Metadata(capacity, model.device)
            self._logits = torch.zeros(capacity.rows, tasks, dtype=torch.float32, device=model.device)
            # The arrays are views of pinned memory.
            self._answers = [(torch.zeros(capacity.rows, tasks, pin_memory=True).numpy(), Event()) for _ in range(2)]
            groups = layer_groups(model.config.layers)
            self._waits = LayerWaits(groups)
            self._gates = [Gates(self._waits, groups) for _ in range(2)]
            self._groups = groups
            self._copy = HostCopy()
            self._context = current_context()
            self._capturing = OwnStream()  # what others queued on it meanwhile would become part of the graph
        self._graphs: OrderedDict[GraphKey, Graph] = OrderedDict()
        self._runs: dict[GraphKey, int] = {}  # batches of each kind that were launched kernel by kernel
        self._rows = self._padded_rows = self._captures = 0

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture the graphs that nearly every batch needs, while none is under way.

        Each kind first runs over rows that say "nothing here": captured is only what is compiled and loaded.
        """
        if not self._capture:
            return
        began, stream, config = monotonic(), self._enter(), self._model.config
        keys = usual_keys(
            self._metadata.capacity.rows, config.layers, config.head_dim, loads=self._keeps,
            deterministic=self._stack.work_options["deterministic"],
        )  # fmt: skip
        with torch.cuda.device(self._model.device):
            for bucket, kinds in groupby(keys, lambda key: key.rows):
                for metadata in 2 * (self._metadata, self._early):
                    metadata.room(bucket)  # the views of both turns are made now
                device, pinned, size = self._metadata.nothing(bucket)
                self._copy.run(device.data_ptr(), pinned.data_ptr(), size, stream)
                for key in kinds:
                    if not key.gated:  # the same kernels, and nothing to wait for
                        self._run(key)
                    self._capture_now(key)
                self.settle()  # the pinned buffer is filled again
        log.info("captured %d graphs in %.1f s", len(self._graphs), monotonic() - began)

    def room(self, size: BatchSize) -> BatchArrays:
        """Where the next batch is to be laid out; the batch under way keeps its own."""
        check_rows(size.rows, self._metadata.capacity.rows)
        return self._metadata.room(bucket_rows(size.rows))

    def early_room(self, size: BatchSize) -> BatchArrays:
        """Where the first layers of the next batch are to be laid out."""
        check_rows(size.rows, self._early.capacity.rows)
        return self._early.room(bucket_rows(size.rows))

    def start_early(self, early: EarlyLayers) -> None:
        """Launch the first layers of the batch laid out in `early_room`."""
        stream = self._enter()
        part = self._stage(self._early, early.plan, stream, gated=False, first=0, last=early.layers)
        self._launch(part._replace(early=True), stream)

    def start(self, plan: BatchPlan, arrivals: Arrivals | None = None, early: EarlyLayers | None = None) -> Launched:
        """Launch the batch laid out in `room`, or what `early` has left of it; nothing here waits for the device.

        At most one other may be under way.
        """
        stream, first, gates = self._enter(), 0 if early is None else early.layers, None
        part = self._stage(self._metadata, plan, stream, gated=arrivals is not None, first=first, last=self._layers)
        if arrivals is not None:
            self._gates.reverse()
            gates = self._gates[0]
            gates.open_at(arrivals, stream)
        self._launch(part, stream)
        self._answers.reverse()
        pinned, done = self._answers[0]
        logits = pinned[: plan.candidates]
        self._copy.run(pinned.ctypes.data, self._logits.data_ptr(), logits.nbytes, stream)
        done.record(stream)
        return Launched(logits, done, gates)

    def settle(self) -> None:
        """Block until the device has nothing left to do."""
        torch.cuda.synchronize(self._model.device)

    def _enter(self) -> int:
        """The stream of the batches; the caller's thread need not have called CUDA before."""
        use_context(self._context)
        return int(torch.cuda.current_stream(self._model.device).cuda_stream)

    def _stage(
        self, metadata: Metadata, plan: BatchPlan, stream: int, *, gated: bool, first: int, last: int
    ) -> GraphKey:
        """Plan the attention's work and start the copy to the device; the part of a batch that is staged."""
        bucket = bucket_rows(plan.rows)
        options = self._stack.work_options
        work = metadata.plan_attention(bucket, plan, **options)
        if work.max_splits > self._stack.max_splits(bucket):
            work = metadata.plan_attention(bucket, plan, **options, pieces=1)
        device, pinned, size = metadata.to_copy(bucket, plan.raw_bytes if first == 0 else 0)
        self._copy.run(device.data_ptr(), pinned.data_ptr(), size, stream)
        self._rows += bucket
        self._padded_rows += bucket - plan.rows
        direct = work.max_splits <= 1 and not options["deterministic"]  # a rounded sum is another than an unrounded one
        return GraphKey(bucket, work.tile_rows, direct, gated, first, last)

    def _launch(self, part: GraphKey, stream: int) -> None:
        """The forward over the staged part, on the current stream."""
        for key in segments(part, self._groups, self._layers):
            graph = (self._graphs.get(key) or self._captured(key)) if self._capture else None
            if graph is None:
                self._run(key)
                continue
            self._graphs.move_to_end(key)
            graph.launch(stream)

    @torch.inference_mode()
    def _run(self, key: GraphKey) -> None:
        bucket, metadata = key.rows, self._early if key.early else self._metadata
        late, x = self._late[:bucket], self._stack.buffers.x[:bucket]
        if key.last == 0:
            slots, count = metadata.on_device(bucket, "slots"), metadata.on_device(bucket, "counts")[1:2]
            late_rows(self._stack.buffers.x, self._early.slots, slots, count, late)
            return
        if key.first == 0:
            names = ("tiles", "row", "source", "position", "bucket", "raw")
            self._embedding.run(**{name: metadata.on_device(bucket, name) for name in names}, x=x)
        elif not key.early:
            x = late

        def wait(layer: int) -> None:
            self._waits.before(layer, first=layer == key.first)

        self._stack.run(
            bucket, metadata, key.tile_rows, direct=key.direct, before_layer=wait if key.gated else None,
            first=key.first, last=key.last, x=x,
        )  # fmt: skip
        if key.last < self._layers:
            return
        row, counts = metadata.on_device(bucket, "row"), metadata.on_device(bucket, "counts")[2:]
        self._heads.run(x, self._stack.final_offset, row, counts, self._logits[:bucket])

    def _captured(self, key: GraphKey) -> Graph | None:
        """A new graph for `key`; None where its kind has not come often enough, or cannot be captured.

        Captured is only what a batch before has run kernel by kernel, so that all is compiled and loaded, and kinds that
        hardly ever come, of which there are many where batches are of all sizes and split anywhere, push out no others.
        """
        runs = self._runs[key] = self._runs.get(key, 0) + 1  # of a few thousand keys at most
        return self._capture_now(key) if runs > RUNS_BEFORE_CAPTURE else None

    def _capture_now(self, key: GraphKey) -> Graph | None:
        stream = torch.cuda.ExternalStream(self._capturing.handle, self._model.device)
        try:
            with torch.cuda.stream(stream):
                graph = capture(self._capturing.handle, lambda: self._run(key))
        except (MtserveError, RuntimeError):  # ours, and torch's and Triton's
            log.exception("a batch of %d rows could not be captured; it is launched kernel by kernel", key.rows)
            self._runs[key] = 0  # not tried again at once
            return None
        self._captures += 1
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def stats(self) -> dict[str, Any]:
        """What every runner counts, and graphs: those kept, all that were captured, and those that made room."""
        return {
            "rows": self._rows,
            "padded_rows": self._padded_rows,
            "padded_rows_share": self._padded_rows / self._rows if self._rows else 0.0,
            "graphs": len(self._graphs),
            "captures": self._captures,
            "graph_evictions": self._captures - len(self._graphs),
        }
