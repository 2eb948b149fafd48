"""Feature rows to tokens in three launches: features gathered, then the two products of every kind's MLP.

A program works on one tile, whose tokens are of one kind. Grids follow capacities, so that a captured graph serves
any batch: programs of unused tiles return at once. Every sum runs in one fixed order, whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mtserve.kernels.token_embedding.batch import TILE_TOKENS, TokenBatch
from mtserve.kernels.token_embedding.packed import DEPTH_STEP, PackedTokens
from mtserve.kernels.token_embedding.reference import HOUR_MS, HOURS_OF_WEEK
from mtserve.kernels.triton_silu import silu

GATHER_TOKENS = 32
MAX_COLUMNS = 128


@triton.jit
def _hashed(words_ptr, salt, rows, inside):
    """Rows of a table for the int64 ids at `words_ptr`, which are aligned to 4 bytes only."""
    low = tl.load(words_ptr, mask=inside, other=0).to(tl.uint64)
    high = tl.load(words_ptr + 1, mask=inside, other=0).to(tl.uint64)
    z = (low | (high << 32)) ^ salt.to(tl.uint64, bitcast=True)
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) % rows.to(tl.uint64, bitcast=True)).to(tl.int64)


@triton.jit
def _gather(
    tiles_ptr, source_ptr, raw_ptr, kinds_ptr, columns_ptr, features_ptr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) // PARTS * 4
    kind = tl.load(tile)
    if kind < 0:
        return
    first, tokens = tl.load(tile + 1), tl.load(tile + 2)
    columns = tl.load(kinds_ptr + 4 * kind + 1)
    offset_in_tile = tl.program_id(0) % PARTS * M
    if tl.program_id(1) >= columns or offset_in_tile >= tokens:
        return
    column_ptr = columns_ptr + (tl.load(kinds_ptr + 4 * kind) + tl.program_id(1)) * 8
    offset, address, rows = tl.load(column_ptr), tl.load(column_ptr + 1), tl.load(column_ptr + 2)
    width, salt, place = tl.load(column_ptr + 3), tl.load(column_ptr + 4), tl.load(column_ptr + 5)
    token = offset_in_tile + tl.arange(0, M)
    inside = token < tokens
    token += first
    cell = raw_ptr.to(tl.pointer_type(tl.uint8)) + (tl.load(source_ptr + token, mask=inside, other=0) + offset)
    out = features_ptr + (token.to(tl.int64) * DEPTH + place)
    n = tl.arange(0, N)
    if address != 0:
        row = _hashed(cell.to(tl.pointer_type(tl.uint32)), salt, rows, inside)
        values = address.to(tl.pointer_type(features_ptr.dtype.element_ty)) + row * width
        for start in range(0, width, N):
            within = inside[:, None] & (start + n < width)[None, :]
            value = tl.load(values[:, None] + (start + n)[None, :], mask=within)
            tl.store(out[:, None] + (start + n)[None, :], value, mask=within)
    else:
        floats = cell.to(tl.pointer_type(tl.float32))
        for start in range(0, width, N):
            within = inside[:, None] & (start + n < width)[None, :]
            value = tl.load(floats[:, None] + (start + n)[None, :], mask=within & (offset >= 0), other=0.0)
            tl.store(out[:, None] + (start + n)[None, :], value.to(features_ptr.dtype.element_ty), mask=within)


@triton.jit
def _product(
    rows_ptr, weight_ptr, depth, token, inside, first_column,
    STRIDE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N]: rows `token` (0 where not `inside`), [.., STRIDE], times columns from `first_column` of [depth, D]."""
    k, n = tl.arange(0, K), first_column + tl.arange(0, N)
    left_ptr = rows_ptr + token.to(tl.int64)[:, None] * STRIDE + k[None, :]
    right_ptr = weight_ptr + k[:, None] * D + n[None, :]
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, depth, K):
        if STRIDE % K == 0:
            left = tl.load(left_ptr + start, mask=inside[:, None], other=0.0)
            right = tl.load(right_ptr + start * D, mask=(n < D)[None, :], other=0.0)
        else:
            left = tl.load(left_ptr + start, mask=inside[:, None] & (start + k < depth)[None, :], other=0.0)
            right = tl.load(right_ptr + start * D, mask=(start + k < depth)[:, None] & (n < D)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _hidden(
    tiles_ptr, kinds_ptr, features_ptr, weight_ptr, bias_ptr, hidden_ptr,
    APPROXIMATE: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    kind = tl.load(tile)
    if kind < 0:
        return
    token = tl.arange(0, M)
    inside = token < tl.load(tile + 2)
    token += tl.load(tile + 1)
    first_row, depth = tl.load(kinds_ptr + 4 * kind + 2).to(tl.int64), tl.load(kinds_ptr + 4 * kind + 3)
    first_column = tl.program_id(1) * N
    total = _product(features_ptr, weight_ptr + first_row * D, depth, token, inside, first_column, DEPTH, D, M, N, K)
    n = first_column + tl.arange(0, N)
    total += tl.load(bias_ptr + kind * D + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    value = silu(total, APPROXIMATE).to(hidden_ptr.dtype.element_ty)
    within = inside[:, None] & (n < D)[None, :]
    tl.store(hidden_ptr + token.to(tl.int64)[:, None] * D + n[None, :], value, mask=within)


@triton.jit
def _rows(table_ptr, row, n, within, D: tl.constexpr):
    return tl.load(table_ptr + row.to(tl.int64)[:, None] * D + n[None, :], mask=within, other=0.0).to(tl.float32)


@triton.jit
def _tokens(
    tiles_ptr, row_ptr, source_ptr, position_ptr, bucket_ptr, raw_ptr, hidden_ptr, weight_ptr, bias_ptr,
    position_table, gap_table, recency_table, hour_table, x_ptr,
    BEHAVIOURS: tl.constexpr, HOUR_MS: tl.constexpr, HOURS: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 4
    kind = tl.load(tile)
    if kind < 0:
        return
    token = tl.arange(0, M)
    inside = token < tl.load(tile + 2)
    token += tl.load(tile + 1)
    first_column = tl.program_id(1) * N
    matrix = weight_ptr + kind.to(tl.int64) * (D * D)
    total = _product(hidden_ptr, matrix, D, token, inside, first_column, D, D, M, N, K)
    n = first_column + tl.arange(0, N)
    within = inside[:, None] & (n < D)[None, :]
    total += tl.load(bias_ptr + kind * D + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    if kind >= BEHAVIOURS:
        bucket = tl.load(bucket_ptr + token, mask=inside, other=0)
        if kind == BEHAVIOURS:
            position = tl.load(position_ptr + token, mask=inside, other=0)
            total += _rows(position_table, position, n, within, D)
            total += _rows(gap_table, bucket, n, within, D)
        else:
            total += _rows(recency_table, bucket, n, within, D)
        source = tl.load(source_ptr + token, mask=inside, other=0)
        words = (raw_ptr.to(tl.pointer_type(tl.uint8)) + source).to(tl.pointer_type(tl.uint32))
        low = tl.load(words, mask=inside, other=0).to(tl.int64)
        high = tl.load(words + 1, mask=inside, other=0).to(tl.int64)
        total += _rows(hour_table, (low | (high << 32)) // HOUR_MS % HOURS, n, within, D)
    row = tl.load(row_ptr + token, mask=inside, other=0).to(tl.int64)
    tl.store(x_ptr + row[:, None] * D + n[None, :], total.to(x_ptr.dtype.element_ty), mask=within)


def token_embedding(
    packed: PackedTokens,
    batch: TokenBatch,
    features: torch.Tensor,
    hidden: torch.Tensor,
    x: torch.Tensor,
    *,
    approximate: bool = True,
) -> None:
    """Writes x [rows, d] in the rows of the batch's tokens, and no others.

    `features` [T, packed.depth] and `hidden` [T, d] are scratch in x's type, whatever they hold.
    `approximate`: the hardware's tanh, exact to bf16's last bit or so; False for checks in fp32.
    """
    weights, d, depth = packed.weights, packed.weights.d, packed.depth
    tokens, tiles = len(batch.row), len(batch.tiles)
    assert len(batch.source) == len(batch.position) == len(batch.bucket) == tokens
    assert features.shape[1] == depth and hidden.shape[1] == x.shape[1] == d
    assert len(features) >= tokens and len(hidden) >= tokens
    assert features.dtype == hidden.dtype == x.dtype == packed.input_weight.dtype == weights.hour.dtype
    assert x.is_contiguous() and features.is_contiguous() and hidden.is_contiguous()
    columns = min(MAX_COLUMNS, max(16, triton.next_power_of_2(packed.widest)))
    parts = TILE_TOKENS // GATHER_TOKENS
    _gather[(tiles * parts, packed.most_columns)](
        batch.tiles, batch.source, batch.raw, packed.kinds, packed.columns, features,
        DEPTH=depth, PARTS=parts, M=GATHER_TOKENS, N=columns, num_warps=4,
    )  # fmt: skip
    n = min(128, max(16, triton.next_power_of_2(d)))
    shape = {"D": d, "M": TILE_TOKENS, "K": DEPTH_STEP, "num_warps": 8, "num_stages": 3}
    _hidden[(tiles, triton.cdiv(d, n))](
        batch.tiles, packed.kinds, features, packed.input_weight, packed.input_bias, hidden,
        APPROXIMATE=approximate, DEPTH=depth, N=n, **shape,
    )  # fmt: skip
    n = min(64, n)  # the tables' rows take registers too: twice the columns would leave one program a multiprocessor
    _tokens[(tiles, triton.cdiv(d, n))](
        batch.tiles, batch.row, batch.source, batch.position, batch.bucket, batch.raw,
        hidden, packed.output_weight, packed.output_bias,
        weights.position, weights.gap, weights.recency, weights.hour, x,
        BEHAVIOURS=weights.behaviours, HOUR_MS=HOUR_MS, HOURS=HOURS_OF_WEEK, N=n, **shape,
    )  # fmt: skip
