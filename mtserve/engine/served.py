"""One model and what serves it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from mtserve.config import EngineConfig
from mtserve.engine.forward.planner import Planner
from mtserve.engine.forward.runner import BatchRunner
from mtserve.engine.forward.runners import largest_batch, make_runner
from mtserve.engine.forward.unpackers import make_unpacker
from mtserve.engine.memory import Memory
from mtserve.engine.request.sequence import SequenceBuilder
from mtserve.errors import InvalidArgument
from mtserve.kernels.page_write.rounding import FP8, LARGEST_FP8
from mtserve.model.ranking import RankingModel
from mtserve.model.state_bound import state_bound
from mtserve.model.weights import fingerprint
from mtserve.transfer.mover import Unpacker
from mtserve.transfer.pool import PageShape


@dataclass(eq=False)
class Served:
    """The model on its device, who builds its sequences, plans its batches and runs them, and who unpacks its pages.

    `most_rows`: of the largest batch that the runner has room for. `unpacker`: None where the host keeps the states as
    they are.
    """

    model: RankingModel
    fingerprint: str
    builder: SequenceBuilder
    planner: Planner
    runner: BatchRunner
    most_rows: int
    unpacker: Unpacker | None


@dataclass(frozen=True)
class Place:
    """Where models are served, one after the other: by which kernels, and in which memory (None: keep no states)."""

    config: EngineConfig
    device: torch.device
    dtype: torch.dtype
    kernels: str
    shape: PageShape
    memory: Memory | None

    def serve(self, model: RankingModel) -> Served:
        """Raises InvalidArgument for weights whose K and V the pages may not be able to hold."""
        if model.device != self.device or model.dtype != self.dtype:
            model = copy.deepcopy(model).to(self.device, self.dtype)
        self._check_range(model)
        digest, config, memory = fingerprint(model), self.config, self.memory
        # States are of these weights, in this type, on such pages.
        builder = SequenceBuilder(
            model.config, model.schema, f"{digest} {self.dtype} {self.shape.dtype} {self.shape.sizes}"
        )
        planner, most_rows = Planner(model, config.page_tokens), largest_batch(model, config)
        if memory is None:
            return Served(
                model, digest, builder, planner, make_runner(model, config, self.kernels, None), most_rows, None
            )
        runner = make_runner(model, config, self.kernels, memory.pool, memory.packed)
        unpacker = None
        if memory.packed is not None:
            unpacker = make_unpacker(self.kernels, memory.packed, memory.pool, model)
        return Served(model, digest, builder, planner, runner, most_rows, unpacker)

    def _check_range(self, model: RankingModel) -> None:
        if self.memory is None or self.shape.dtype != FP8:
            return
        bound = state_bound(model)
        if not bound <= LARGEST_FP8:
            raise InvalidArgument(
                f"this model's K and V may reach {bound:.4g}, and 'fp8' holds no more than {LARGEST_FP8:g}",
                field="gpu_format",
            )
