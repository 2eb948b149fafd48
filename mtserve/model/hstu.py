"""One HSTU layer over a batch's new rows: the five steps of the model's definition."""

from __future__ import annotations

import torch
from torch import nn

from mtserve.config import ModelConfig
from mtserve.kernels.backend import Kernels
from mtserve.kernels.host_format.packed import PackedRows
from mtserve.kernels.host_format.reference import encode_rows
from mtserve.kernels.page_write.rounding import rounded
from mtserve.kernels.plan import KernelPlan


class HSTULayer(nn.Module):
    """Parameters of one layer; `groups` is 4 (U, S, R, C) for group norm and 1 for plain layer norm."""

    def __init__(self, config: ModelConfig, groups: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.attention_length, self.gate_first = config.attention_length, config.gate_first
        width = config.heads * config.head_dim
        self.norm_weight = nn.Parameter(torch.empty(groups, config.d))
        self.norm_bias = nn.Parameter(torch.empty(groups, config.d))
        self.uvqk_weight = nn.Parameter(torch.empty(config.d, 4 * width))
        self.uvqk_bias = nn.Parameter(torch.empty(4 * width))
        self.gate_weight = nn.Parameter(torch.empty(groups, width))
        self.gate_bias = nn.Parameter(torch.empty(groups, width))
        self.output_weight = nn.Parameter(torch.empty(width, config.d))
        self.output_bias = nn.Parameter(torch.empty(config.d))

    def forward(
        self,
        x: torch.Tensor,
        pages: torch.Tensor | None,
        plan: KernelPlan,
        kernels: Kernels,
        packed: PackedRows | None = None,
    ) -> torch.Tensor:
        """[T, d] rows after the layer; K and V of the plan's write rows go into `pages` of this layer.

        What pages cannot hold of K and V, no row sees: not those of this batch either, nor a candidate of itself.

        Rows with a target in `packed` are kept there too: K and V, or the normalised rows, as its format has it.
        """
        normalised = kernels.group_layer_norm(x, self.norm_weight, self.norm_bias, plan.group)
        mixed = kernels.projection_silu(normalised, self.uvqk_weight, self.uvqk_bias)
        u, v, q, k = mixed.view(len(x), 4, self.heads, self.head_dim).unbind(1)
        if pages is not None:
            k, v = rounded(k, pages.dtype), rounded(v, pages.dtype)
        y = kernels.attention(q, k, v, pages, plan, self.attention_length)
        if pages is not None:
            kernels.page_write(k, v, pages, plan)
        if packed is not None:
            shape, packed_pages, target, layer = packed
            encode_rows(shape, (k, v) if shape.sides == 2 else (normalised,), packed_pages, target, layer)
        gated = kernels.norm_gate(
            y.flatten(1), u.flatten(1), self.gate_weight, self.gate_bias, plan.group, self.gate_first
        )
        return torch.addmm(self.output_bias, gated, self.output_weight).add_(x)
