"""Runs one planned batch on the model's device."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from mtserve.engine.planner import BatchPlan
from mtserve.kernels.backend import Kernels
from mtserve.kernels.plan import KernelPlan
from mtserve.model.ranking import RankingModel


class BatchRunner(Protocol):
    """What the loop needs of a runner."""

    def run(self, plan: BatchPlan) -> npt.NDArray[np.float32]:
        """float32 [candidates of the batch, tasks] logits; new states are in their pages when this returns."""
        ...


class Runner:
    """Executes plans with one model, one set of kernels and one pool of pages (None: keep no states)."""

    def __init__(self, model: RankingModel, kernels: Kernels, pool: torch.Tensor | None) -> None:
        self._model = model
        self._kernels = kernels
        self._pool = pool

    @torch.inference_mode()
    def run(self, plan: BatchPlan) -> npt.NDArray[np.float32]:
        """float32 [candidates of the batch, tasks] logits; new states are in their pages when this returns."""
        kernel = KernelPlan.of(plan.layout, self._model.device)
        rows = self._model.embed(plan.inputs)
        rows = self._model.encode(rows, self._pool, kernel, self._kernels)
        logits = self._model.logits(rows.index_select(0, kernel.candidate_rows))
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        result: npt.NDArray[np.float32] = logits.cpu().numpy()
        return result
