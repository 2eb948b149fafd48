"""What restoring costs: as calibrated at an earlier start on the same machine and shape of model, or now."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from mtserve.config import EngineConfig
from mtserve.engine.calibration import calibrate, cost_key
from mtserve.engine.forward.planner import Planner
from mtserve.engine.forward.runner import BatchRunner
from mtserve.engine.request.sequence import SequenceBuilder
from mtserve.model.ranking import RankingModel
from mtserve.restore.cache import CostCache, default_path
from mtserve.restore.costs import Costs
from mtserve.transfer.mover import Mover


def known_costs(
    runner: BatchRunner, planner: Planner, builder: SequenceBuilder, mover: Mover, model: RankingModel,
    config: EngineConfig, kernels: str, *, host_pages: int,
) -> Costs:  # fmt: skip
    """Costs of `model` on this machine; calibrated, which overwrites pages of the pool, where nobody has done so before."""
    known = CostCache(default_path())
    key = cost_key(builder, mover, model, config, kernels, host_pages=host_pages)
    costs = known.get(key)
    if costs is None:
        with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
            costs = calibrate(runner, planner, builder, mover, model, config, host_pages=host_pages)
        known.put(key, costs)
    return costs
