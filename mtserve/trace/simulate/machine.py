"""The machine that a simulation foretells: what one batch of it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mtserve.config import EngineConfig, ModelConfig
from mtserve.engine.setup import page_shape
from mtserve.engine.tiers.footprint import link_shape, packed_format
from mtserve.restore.choice import AUTO, Layout, Need, Work, choose
from mtserve.restore.costs import Costs
from mtserve.restore.gpus import GpuFigures
from mtserve.transfer.cuda_mover import split_course


@dataclass(frozen=True)
class Machine:
    """`costs` of one shape of model there, and how its pages cross the link.

    `request_s`: of the loop for each request of a batch. `link_page_bytes`: of a page on the link. `way`: by which states
    come back from the host, as `EngineConfig.restore`.
    """

    costs: Costs
    request_s: float
    layers: int
    page_tokens: int
    link_page_bytes: int
    way: str = AUTO

    @classmethod
    def of(cls, model: ModelConfig, engine: EngineConfig, dtype: torch.dtype, figures: GpuFigures | Costs) -> Machine:
        """From rates of a GPU, or from costs that an engine has measured: these know of no cost of a request."""
        states = page_shape(model, engine, dtype)
        packed = packed_format(model, engine, states)
        link_page_bytes = link_shape(states, packed).bytes
        if isinstance(figures, Costs):
            return cls(figures, 0.0, model.layers, engine.page_tokens, link_page_bytes, engine.restore)
        costs = figures.costs(model, packed=packed is not None, fp8=engine.gpu_format == "fp8")
        return cls(costs, figures.request_s, model.layers, engine.page_tokens, link_page_bytes, engine.restore)

    def batch_s(self, needs: Sequence[Need], others: Sequence[Work], way: str | None = None) -> float:
        """Seconds of one batch on an idle machine: of users with states on the host alone, and of other users.

        `way`: another than the machine's own.
        """
        layout = self._layout(needs)
        work = Work(sum(each.rows for each in others), sum(each.pairs for each in others))
        beside_s = self.request_s * (len(needs) + len(others))
        return choose(self.costs, layout, needs, work, way=way or self.way).predicted_s + beside_s

    def _layout(self, needs: Sequence[Need]) -> Layout:
        """As the engine's mover brings so much."""
        layout = Layout(self.layers, self.page_tokens, self.link_page_bytes // self.layers)
        pages = sum(map(layout.pages, needs))
        if not pages:
            return layout
        unpacked = self.costs.unpack_s > 0
        groups, grouped, parts = split_course(self.layers, pages, self.link_page_bytes, unpacked=unpacked)
        return replace(layout, groups=groups, grouped=grouped / pages, parts=parts)
