"""Which runner serves a model, and how large its batches may become."""

from __future__ import annotations

import torch

from mtserve.config import EngineConfig
from mtserve.engine.runner import BatchRunner, Runner
from mtserve.kernels.backend import load_kernels
from mtserve.model.ranking import RankingModel


def max_prefix(model: RankingModel) -> int:
    """Tokens of the longest prefix that the model's configuration allows."""
    return len(model.schema.user) + model.config.max_history


def make_runner(model: RankingModel, config: EngineConfig, kernels: str, pool: torch.Tensor | None) -> BatchRunner:
    """The runner for `kernels`, over `pool` (None: keep no states). Room for the largest batch, or one user alone."""
    if kernels != "cuda":
        return Runner(model, load_kernels(kernels), pool)
    # Only CUDA machines have what these kernels are built from.
    from mtserve.engine.graphs import GraphRunner

    longest = max_prefix(model)
    return GraphRunner(
        model, pool, config.page_tokens,
        rows=max(config.max_batch_tokens, longest + config.max_candidates), slots=config.max_batch_requests,
        width=-(-longest // config.page_tokens), capture=config.graphs == "on", deterministic=config.deterministic,
    )  # fmt: skip
