"""The ranking model: tokenisers, HSTU layers, multi-task heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mtserve.config import ModelConfig
from mtserve.kernels.backend import Kernels
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.plan import KernelPlan
from mtserve.kernels.token_embedding.reference import HOURS_OF_WEEK
from mtserve.model.embedding import HashedTables
from mtserve.model.hstu import HSTULayer
from mtserve.model.schema import FeatureSchema
from mtserve.model.tokeniser import GAP_BUCKETS, Array, KindTokens, TokenInputs, Tokeniser, hours_of_week

GROUP_U, GROUP_S, GROUP_R, GROUP_C = range(4)


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

    def embed(self, inputs: TokenInputs) -> torch.Tensor:
        """[rows, d] tokens of a batch, each in its row."""
        *users, behaviours, candidates = inputs.kinds
        x = torch.empty(inputs.rows, self.config.d, device=self.device, dtype=self.dtype)
        for tokeniser, kind in zip(self.user_tokens, users, strict=True):
            self._embed(x, tokeniser, kind)
        self._embed(
            x, self.behaviour_token, behaviours, (self.position, behaviours.position), (self.gap, behaviours.bucket)
        )
        self._embed(x, self.candidate_token, candidates, (self.recency, candidates.bucket))
        return x

    def _embed(
        self, x: torch.Tensor, tokeniser: nn.Module, kind: KindTokens, *tables: tuple[torch.Tensor, Array]
    ) -> None:
        """Write the tokens of one kind into `x`, the rows of `tables` added, and the hour's where time is known."""
        assert isinstance(tokeniser, Tokeniser)
        rows = kind.features
        if not len(rows):
            return
        tokens = tokeniser([self._upload(array) for array in tokeniser.feed(rows, self.tables)], self.tables)
        if tables:
            tables += ((self.hour, hours_of_week(rows["time_ms"])),)
        for table, index in tables:
            tokens += table.index_select(0, self._upload(index))
        x.index_copy_(0, self._upload(kind.destinations), tokens)

    def _upload(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def encode(
        self,
        x: torch.Tensor,
        pool: torch.Tensor | None,
        plan: KernelPlan,
        kernels: Kernels,
        packed: PackedPages | None = None,
        *,
        first: int = 0,
        last: int | None = None,
    ) -> torch.Tensor:
        """[T, d] rows after layers [first, last), to the end by default, of rows `x` as layer `first` reads them.

        `pool` [pages, layers, 2, page_tokens, H, D], None to use and keep no states. The plan's write rows go into the
        `packed` pages of the same ids too, where there are any.
        """
        for index in range(first, len(self.layers) if last is None else last):
            pages = None if pool is None else pool[:, index]
            rows = None if packed is None else packed.rows(plan.target, index)
            x = self.layers[index](x, pages, plan, kernels, rows)
        return x

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[candidates, tasks] float32 logits of candidate rows [candidates, d]."""
        return torch.cat([self.heads[task](rows) for task in self.config.tasks], dim=-1).float()
