"""Token weights as the GPU's kernels read them: everything that depends on a token's kind is found by its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mtserve.kernels.token_embedding.weights import KindWeights, TokenWeights

DEPTH_STEP = 64
_ZEROS = -1  # in place of a column's byte offset


@dataclass(frozen=True)
class PackedTokens:
    """Copies of the MLPs' weights; `weights` keeps alive the tables that `columns` holds addresses of.

    `kinds` int32 [kinds, 4]: first column, columns, first row of `input_weight`, depth: the input's width rounded up
    to a multiple of DEPTH_STEP, the rest being a column of zeros.
    `columns` int64 [columns, 8]: byte offset in the feature row (-1: the column is zeros), address of the table (0:
    the row holds float32 values), its rows, width, salt, place in the input, 0, 0.
    `input_weight` [sum of depths, d], `output_weight` [kinds, d, d]: inputs by outputs; biases [kinds, d].
    `depth`: of the deepest kind; `most_columns`: of one kind; `widest`: column.
    """

    weights: TokenWeights
    kinds: torch.Tensor
    columns: torch.Tensor
    input_weight: torch.Tensor
    input_bias: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor
    depth: int
    most_columns: int
    widest: int


def pack_tokens(weights: TokenWeights) -> PackedTokens:
    """`weights` packed in their own type, on their own device; later changes to an MLP's weights go unseen."""
    device = weights.hour.device
    columns = [list(_columns(kind)) for kind in weights.kinds]
    depths = [_depth(kind) for kind in weights.kinds]
    kinds = [
        [sum(map(len, columns[:index])), len(columns[index]), sum(depths[:index]), depth]
        for index, depth in enumerate(depths)
    ]
    input_weight = torch.zeros(sum(depths), weights.d, dtype=weights.hour.dtype, device=device)
    for (_, _, first, _), kind in zip(kinds, weights.kinds, strict=True):
        input_weight[first : first + kind.input_weight.shape[1]] = kind.input_weight.t()
    return PackedTokens(
        weights=weights,
        kinds=torch.tensor(kinds, dtype=torch.int32, device=device),
        columns=torch.tensor([column for each in columns for column in each], dtype=torch.int64, device=device),
        input_weight=input_weight,
        input_bias=torch.stack([kind.input_bias for kind in weights.kinds]),
        output_weight=torch.stack([kind.output_weight.t() for kind in weights.kinds]).contiguous(),
        output_bias=torch.stack([kind.output_bias for kind in weights.kinds]),
        depth=max(depths),
        most_columns=max(map(len, columns)),
        widest=max(column.width for kind in weights.kinds for column in kind.columns),
    )


def _depth(kind: KindWeights) -> int:
    return -(-kind.input_weight.shape[1] // DEPTH_STEP) * DEPTH_STEP


def _columns(kind: KindWeights) -> Iterator[list[int]]:
    """The kind's rows of `PackedTokens.columns`."""
    place = 0
    for column in kind.columns:
        table = column.table
        address, rows = (0, 0) if table is None else (table.data_ptr(), len(table))
        assert table is None or (table.is_contiguous() and table.shape[1] == column.width)
        signed = column.salt - (column.salt >> 63 << 64)
        yield [column.offset, address, rows, column.width, signed, place, 0, 0]
        place += column.width
    if place < _depth(kind):
        yield [_ZEROS, 0, 0, _depth(kind) - place, 0, place, 0, 0]
