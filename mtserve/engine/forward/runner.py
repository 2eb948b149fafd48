"""Runs one planned batch on the model's device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mtserve.engine.forward.batch import BatchArrays, BatchPlan, BatchSize, EarlyLayers
from mtserve.errors import InvalidArgument
from mtserve.kernels.backend import Kernels
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.plan import KernelPlan
from mtserve.model.ranking import RankingModel
from mtserve.transfer.mover import Arrivals


class Pending(Protocol):
    """A batch on its way."""

    def result(self) -> npt.NDArray[np.float32]:
        """float32 [candidates of the batch, tasks] logits; new states are in their pages when this returns."""
        ...

    def waited(self) -> dict[int, float]:
        """Of a batch over loads, once it has a result: first layer of each group -> seconds from the batch's start
        until the group's pages had come, 0 where they were there. Empty of others.
        """
        ...


class BatchRunner(Protocol):
    """What the loop needs of a runner. `overlaps`: whether `start` returns before the batch is done."""

    overlaps: bool

    def prepare(self) -> None:
        """Do ahead, in seconds, what would make the first batches slow. Before the first, if at all."""
        ...

    def room(self, size: BatchSize) -> BatchArrays:
        """Where the next batch to start is laid out. Called once a batch; at most one other is under way.

        Raises InvalidArgument for more rows than the runner was made for.
        """
        ...

    def early_room(self, size: BatchSize) -> BatchArrays:
        """As `room`, for the first layers of a batch that is split."""
        ...

    def start_early(self, early: EarlyLayers) -> None:
        """Launch the first layers of a batch, which wait for nothing; `start` of the same batch is next."""
        ...

    def start(self, plan: BatchPlan, arrivals: Arrivals | None = None, early: EarlyLayers | None = None) -> Pending:
        """Launch a batch, whose layers wait for `arrivals`, or what `early` has left of it; at most one other is under way."""
        ...

    def settle(self) -> None:
        """Block until nothing of any batch runs any more, those that failed to start included."""
        ...

    def stats(self) -> dict[str, Any]:
        """JSON-able counts since the runner was made.

        `rows`: of all batches, padding included; `padded_rows`: of these, computed for nothing;
        `padded_rows_share`: their share of all rows, None of a runner that never pads.
        """
        ...


def check_rows(rows: int, most: int) -> None:
    """Raise InvalidArgument for a batch larger than a runner has room for: a budget that did not hold."""
    if rows > most:
        raise InvalidArgument(f"a batch of {rows} rows, the largest has {most}", field="rows")


@dataclass(frozen=True)
class Done:
    """A batch that was done when it was started."""

    logits: npt.NDArray[np.float32]

    def result(self) -> npt.NDArray[np.float32]:
        return self.logits

    def waited(self) -> dict[int, float]:
        return {}


class Runner:
    """Executes plans with one model, one set of plain kernels, one pool of pages (None: keep no states), their twins."""

    overlaps = False

    def __init__(
        self,
        model: RankingModel,
        kernels: Kernels,
        pool: torch.Tensor | None,
        packed: PackedPages | None = None,
        *,
        rows: int = sys.maxsize,
    ) -> None:
        """`rows`: of the largest batch, as for a runner whose memory ends there."""
        self._model, self._most_rows = model, rows
        self._kernels = kernels
        self._pool, self._packed = pool, packed
        self._rows = 0
        self._early: torch.Tensor | None = None  # rows after the first layers of the batch that is to start

    def prepare(self) -> None:
        """The first batch is like any other."""

    def room(self, size: BatchSize) -> BatchArrays:
        """Fresh arrays, no larger than they need to be."""
        check_rows(size.rows, self._most_rows)
        return BatchArrays.empty(size)

    def early_room(self, size: BatchSize) -> BatchArrays:
        return self.room(size)

    @torch.inference_mode()
    def start_early(self, early: EarlyLayers) -> None:
        """Run the first layers of a batch."""
        self._rows += early.plan.rows
        rows = self._model.embed(early.plan.inputs(self._model.schema))
        self._early = self._encode(rows, early.plan, 0, early.layers)

    @torch.inference_mode()
    def start(self, plan: BatchPlan, arrivals: Arrivals | None = None, early: EarlyLayers | None = None) -> Done:
        """Run a batch to its end; what it waits for, it waits for as a whole."""
        layers = 0
        if early is None:
            self._rows += plan.rows
            rows = self._model.embed(plan.inputs(self._model.schema))
        else:
            assert self._early is not None
            layers, rows, self._early = early.layers, self._early, None
            rows = rows.index_select(0, torch.from_numpy(early.late_rows(plan)).to(self._model.device))
        if arrivals is not None:
            arrivals.wait()
        rows = self._encode(rows, plan, layers, None)
        candidates = torch.from_numpy(plan.layout.candidate_rows).to(self._model.device)
        logits = self._model.logits(rows.index_select(0, candidates))
        self.settle()
        return Done(logits.cpu().numpy())

    def _encode(self, rows: torch.Tensor, plan: BatchPlan, first: int, last: int | None) -> torch.Tensor:
        kernel = KernelPlan.of(plan.layout, self._model.device)
        return self._model.encode(rows, self._pool, kernel, self._kernels, self._packed, first=first, last=last)

    def settle(self) -> None:
        """Only CUDA runs behind its callers' backs."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def stats(self) -> dict[str, Any]:
        """Batches are computed as they come: nothing is padded."""
        return {"rows": self._rows, "padded_rows": 0, "padded_rows_share": None}
