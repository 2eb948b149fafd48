"""The heads' weights, as given and as the GPU's kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_COLUMNS = 128


@dataclass(frozen=True)
class Head:
    """One task's MLP from a row [d] to its logit: hidden weight [h, d] and bias [h], output weight [1, h], bias [1]."""

    hidden_weight: torch.Tensor
    hidden_bias: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor


@dataclass(frozen=True)
class PackedHeads:
    """Copies of all tasks' weights; H is h rounded up to a multiple of `columns`, the rest zeros: they add nothing.

    `hidden_weight` [tasks, d, H]; `hidden_bias`, `output_weight` [tasks, H]; `output_bias` [tasks].
    """

    columns: int
    hidden_weight: torch.Tensor
    hidden_bias: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor


def pack_heads(heads: Sequence[Head]) -> PackedHeads:
    """`heads` packed in their own type, on their own device; later changes to them go unseen."""
    h, d = heads[0].hidden_weight.shape
    columns = MAX_COLUMNS
    while columns > 16 and columns // 2 >= h:
        columns //= 2
    padded = -(-h // columns) * columns
    like = heads[0].hidden_weight
    packed = PackedHeads(
        columns=columns,
        hidden_weight=like.new_zeros(len(heads), d, padded),
        hidden_bias=like.new_zeros(len(heads), padded),
        output_weight=like.new_zeros(len(heads), padded),
        output_bias=torch.cat([head.output_bias for head in heads]),
    )
    for task, head in enumerate(heads):
        packed.hidden_weight[task, :, :h] = head.hidden_weight.t()
        packed.hidden_bias[task, :h] = head.hidden_bias
        packed.output_weight[task, :h] = head.output_weight[0]
    return packed
