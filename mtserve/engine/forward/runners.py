"""Which runner serves a model, and how large its batches may become."""

from __future__ import annotations

import torch

from mtserve.config import EngineConfig
from mtserve.engine.forward.runner import BatchRunner, Runner
from mtserve.kernels.backend import load_kernels
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.model.ranking import RankingModel


def max_prefix(model: RankingModel) -> int:
    """Tokens of the longest prefix that the model's configuration allows."""
    return len(model.schema.user) + model.config.max_history


def largest_batch(model: RankingModel, config: EngineConfig) -> int:
    """Rows of the largest batch: of many users, or of one alone."""
    return max(config.max_batch_tokens, max_prefix(model) + config.max_candidates)


def make_runner(
    model: RankingModel,
    config: EngineConfig,
    kernels: str,
    pool: torch.Tensor | None,
    packed: PackedPages | None = None,
) -> BatchRunner:
    """The runner for `kernels`, over `pool` (None: keep no states) and its `packed` twins.

    It has room for the largest batch, or for one user alone.
    """
    if kernels != "cuda":
        return Runner(model, load_kernels(kernels), pool, packed, rows=largest_batch(model, config))
    # Only CUDA machines have what these kernels are built from.
    from mtserve.engine.forward.graphs import GraphRunner

    return GraphRunner(
        model, pool, config.page_tokens, rows=largest_batch(model, config), slots=config.max_batch_requests,
        width=-(-max_prefix(model) // config.page_tokens), capture=config.graphs != "off", deterministic=config.deterministic,
        packed=packed,
    )  # fmt: skip
