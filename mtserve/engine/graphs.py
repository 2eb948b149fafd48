"""The runner for CUDA: one captured graph a bucket of rows, one copy of metadata a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mtserve.engine.metadata import Metadata, bucket_rows
from mtserve.engine.planner import BatchPlan
from mtserve.engine.stack import Stack
from mtserve.engine.staging import Staging
from mtserve.kernels.plan import HostPlan
from mtserve.model.ranking import RankingModel
from mtserve.model.tokeniser import Array

# Graphs kept at once; the least recently used goes first. A graph of 8 layers takes a few hundred KiB.
MAX_GRAPHS = 256


class GraphKey(NamedTuple):
    """What a captured graph is good for: any batch of this bucket, tile and mode of the attention's output."""

    rows: int
    tile_rows: int
    direct: bool


@dataclass(frozen=True)
class Launched:
    """A batch on its way; its states are in their pages and its logits here when `done` has passed."""

    logits: torch.Tensor
    done: torch.cuda.Event

    def result(self) -> npt.NDArray[np.float32]:
        """float32 [candidates of the batch, tasks] logits; waits for them."""
        self.done.synchronize()
        result: npt.NDArray[np.float32] = self.logits.numpy()
        return result


class GraphRunner:
    """Executes plans with the CUDA kernels. `capture=False` launches kernel by kernel: the same results, slower."""

    overlaps = True

    def __init__(
        self, model: RankingModel, pool: torch.Tensor | None, page_tokens: int, *, rows: int, slots: int, width: int,
        capture: bool = True,
    ) -> None:  # fmt: skip
        self._model = model
        self._capture = capture
        rows = bucket_rows(rows)
        with torch.inference_mode():
            self._stack = Stack(model, pool, page_tokens, rows)
            self._metadata = Metadata(rows, slots, width, model.device)
        self._staging = Staging(model.device)
        self._graphs: OrderedDict[GraphKey, torch.cuda.CUDAGraph] = OrderedDict()
        self.padded_rows = 0  # rows computed for nothing, of all
        self.rows = 0

    @property
    def x(self) -> torch.Tensor:
        """[capacity, d] rows: tokens before `launch`, outputs (without `final_offset`) after it."""
        return self._stack.buffers.x

    @property
    def final_offset(self) -> torch.Tensor:
        """fp32 [d]: what to add to a row of `x` after `launch`."""
        return self._stack.final_offset

    @torch.inference_mode()
    def start(self, plan: BatchPlan) -> Launched:
        """Launch a batch; nothing here waits for the device. At most one other batch may be under way."""
        layout = plan.layout
        uploaded: list[torch.Tensor] = []

        def upload(arrays: Sequence[Array]) -> list[torch.Tensor]:
            uploaded.extend(self._staging.upload([*arrays, layout.candidate_rows]))
            return uploaded[:-1]

        self.x[: layout.rows] = self._model.embed(plan.inputs, upload)
        self.launch(self.stage(layout))
        rows = self.x.index_select(0, uploaded[-1]).float() + self.final_offset
        logits = self._model.logits(rows.to(self._model.dtype))
        pinned = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        pinned.copy_(logits, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Launched(pinned, done)

    def stage(self, layout: HostPlan) -> GraphKey:
        """Plan the attention's work and start the metadata's copy; the graph that the batch needs."""
        config, bucket = self._model.config, bucket_rows(layout.rows)
        shape = {"heads": config.heads, "head_dim": config.head_dim, "sms": self._stack.sms}
        self._metadata.turn()
        work = self._metadata.fill(layout, bucket, **shape)
        if work.max_splits > self._stack.max_splits(bucket):
            work = self._metadata.fill(layout, bucket, **shape, pieces=1)
        self._metadata.upload(bucket)
        self.rows += bucket
        self.padded_rows += bucket - layout.rows
        return GraphKey(bucket, work.tile_rows, work.max_splits <= 1)

    @torch.inference_mode()
    def launch(self, key: GraphKey) -> None:
        """All layers over the staged batch, on the current stream."""
        if not self._capture:
            self._stack.run(key.rows, self._metadata, key.tile_rows, direct=key.direct)
            return
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._record(key)
        self._graphs.move_to_end(key)
        graph.replay()

    def _record(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        """Capture on demand. A first run outside compiles and loads what is lazy; x is put back after it."""
        x = self._stack.buffers.x[: key.rows]
        kept = x.clone()
        self._stack.run(key.rows, self._metadata, key.tile_rows, direct=key.direct)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._stack.run(key.rows, self._metadata, key.tile_rows, direct=key.direct)
        x.copy_(kept)
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph
