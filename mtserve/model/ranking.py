"""The ranking model: tokenisers, HSTU layers, multi-task heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from mtserve.config import ModelConfig
from mtserve.kernels.backend import Kernels
from mtserve.kernels.plan import KernelPlan
from mtserve.model.embedding import HashedTables
from mtserve.model.hstu import HSTULayer
from mtserve.model.schema import FeatureSchema
from mtserve.model.tokeniser import (
    GAP_BUCKETS,
    HOURS_OF_WEEK,
    Array,
    TokenInputs,
    Tokeniser,
    Upload,
    gap_buckets,
    hours_of_week,
)
from mtserve.types import Rows

GROUP_U, GROUP_S, GROUP_R, GROUP_C = range(4)


@dataclass(frozen=True)
class _Feed:
    """Tokens of one kind. `arrays`: int64 destinations, int64 rows of each table in `added`, then the features."""

    tokeniser: Tokeniser
    added: list[torch.Tensor]
    arrays: list[Array]


class RankingModel(nn.Module):
    """A generative ranking model (HSTU; MTGR with its token groups). Parameters and pure functions, no caches."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema) -> None:
        super().__init__()
        self.config, self.schema = config, schema
        used = schema.candidate if config.cross_features else tuple(f for f in schema.candidate if f.role != "cross")
        self.tables = HashedTables(replace(schema, candidate=used))
        self.user_tokens = nn.ModuleList(Tokeniser((feature,), config.d) for feature in schema.user)
        self.behaviour_token = Tokeniser(schema.behaviour, config.d)
        self.candidate_token = Tokeniser(used, config.d)
        self.position = nn.Parameter(torch.empty(config.max_history, config.d))
        self.gap = nn.Parameter(torch.empty(GAP_BUCKETS, config.d))
        self.recency = nn.Parameter(torch.empty(GAP_BUCKETS, config.d))
        self.hour = nn.Parameter(torch.empty(HOURS_OF_WEEK, config.d))
        groups = 4 if config.norm == "group" else 1
        self.layers = nn.ModuleList(HSTULayer(config, groups) for _ in range(config.layers))
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(config.d, config.d // 2), nn.SiLU(), nn.Linear(config.d // 2, 1))
                for task in config.tasks
            }
        )

    @property
    def device(self) -> torch.device:
        return self.position.device

    @property
    def dtype(self) -> torch.dtype:
        return self.position.dtype

    def embed(self, inputs: TokenInputs, upload: Upload | None = None) -> torch.Tensor:
        """[rows, d] tokens of a batch, each in its row. `upload` brings all arrays to the device at once."""
        feeds = [*self._user_feeds(inputs), *self._behaviour_feed(inputs), *self._candidate_feed(inputs)]
        arrays = [array for feed in feeds for array in feed.arrays]
        tensors = iter((upload or self._upload)(arrays))
        x = torch.empty(inputs.rows, self.config.d, device=self.device, dtype=self.dtype)
        for feed in feeds:
            destinations, *rest = (next(tensors) for _ in feed.arrays)
            tokens = feed.tokeniser(rest[len(feed.added) :], self.tables)
            for table, rows in zip(feed.added, rest, strict=False):
                tokens += table.index_select(0, rows)
            x.index_copy_(0, destinations, tokens)
        return x

    def _user_feeds(self, inputs: TokenInputs) -> list[_Feed]:
        feeds = []
        for index, tokeniser in enumerate(self.user_tokens):
            new = inputs.user_destinations[:, index] >= 0
            if new.any():
                destinations = inputs.user_destinations[new, index]
                feeds.append(self._feed(tokeniser, inputs.user_rows[new], destinations))
        return feeds

    def _behaviour_feed(self, inputs: TokenInputs) -> list[_Feed]:
        rows = inputs.behaviours
        if not len(rows):
            return []
        added = (
            (self.position, inputs.positions),
            (self.gap, gap_buckets(inputs.gap_ms)),
            (self.hour, hours_of_week(rows["time_ms"])),
        )
        return [self._feed(self.behaviour_token, rows, inputs.behaviour_destinations, *added)]

    def _candidate_feed(self, inputs: TokenInputs) -> list[_Feed]:
        rows = inputs.candidates
        if not len(rows):
            return []
        added = ((self.recency, gap_buckets(inputs.recency_ms)), (self.hour, hours_of_week(rows["time_ms"])))
        return [self._feed(self.candidate_token, rows, inputs.candidate_destinations, *added)]

    def _feed(self, tokeniser: nn.Module, rows: Rows, destinations: Array, *added: tuple[torch.Tensor, Array]) -> _Feed:
        assert isinstance(tokeniser, Tokeniser)
        arrays = [destinations, *(indices for _, indices in added), *tokeniser.feed(rows, self.tables)]
        return _Feed(tokeniser, [table for table, _ in added], arrays)

    def _upload(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays]

    def encode(self, x: torch.Tensor, pool: torch.Tensor | None, plan: KernelPlan, kernels: Kernels) -> torch.Tensor:
        """[T, d] rows after all layers; `pool` [pages, layers, 2, page_tokens, H, D], None to use and keep no states."""
        for index, layer in enumerate(self.layers):
            x = layer(x, None if pool is None else pool[:, index], plan, kernels)
        return x

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[candidates, tasks] float32 logits of candidate rows [candidates, d]."""
        return torch.cat([self.heads[task](rows) for task in self.config.tasks], dim=-1).float()
