"""The projection's bias, SiLU and page write: in the epilogue of our own matrix product, or as one pass after a library's.

The fused product saves a pass over the output, and loses to the library's where rows abound: FUSED_ROWS is between
the shapes in which either was ahead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 8
COLUMNS = 512
FUSED_ROWS = 8192


@triton.jit
def _silu(x, APPROXIMATE: tl.constexpr):
    # SiLU(x) = h (tanh(h) + 1) with h = x / 2: one special-function instruction instead of two.
    half = 0.5 * x
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * half)) - 1.0
    return half * tanh + half


@triton.jit
def _silu_pages(
    mixed_ptr, bias_ptr, target_ptr, pages_ptr, rows, layer_offset, side_stride, page_stride,
    PAGE_TOKENS: tl.constexpr, PAGED: tl.constexpr, APPROXIMATE: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < 4 * W)[None, :]
    at = row[:, None].to(tl.int64) * (4 * W) + column[None, :]
    x = tl.load(mixed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=column < 4 * W, other=0.0).to(tl.float32)[None, :]
    value = _silu(x, APPROXIMATE).to(mixed_ptr.dtype.element_ty)
    tl.store(mixed_ptr + at, value, mask=inside)
    if PAGED:
        part = column // W  # 0 u, 1 v, 2 q, 3 k
        target = tl.load(target_ptr + row, mask=row < rows, other=-1)
        token = (target // PAGE_TOKENS).to(tl.int64) * page_stride + (target % PAGE_TOKENS).to(tl.int64) * W
        side = tl.where(part == 3, 0, 1)  # a page holds K, then V
        into = layer_offset + token[:, None] + (side * side_stride + column - part * W)[None, :]
        state = inside & (target >= 0)[:, None] & ((part == 1) | (part == 3))[None, :]
        tl.store(pages_ptr + into, value, mask=state)


def silu_pages(
    mixed: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    pool: torch.Tensor | None,
    layer: int,
    *,
    approximate: bool = True,
) -> None:
    """mixed [T, 4 w] becomes SiLU(mixed + bias) in place; its k and v of rows with a target go into `pool`.

    `target` int32 [T]: page * page_tokens + offset, -1 for rows that are not kept. `pool`
    [pages, layers, 2, page_tokens, H, D] with H D = w, None to keep nothing. Offsets are 64-bit.
    `approximate`: the hardware's tanh, exact to bf16's last bit or so; False for checks in fp32.
    """
    rows, columns = mixed.shape
    width = columns // 4
    assert mixed.is_contiguous() and bias.shape == (columns,) and len(target) >= rows
    page_tokens = 1 if pool is None else pool.shape[3]
    _silu_pages[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        mixed, bias, target, mixed if pool is None else pool, rows,
        0 if pool is None else layer * pool.stride(1), page_tokens * width, 0 if pool is None else pool.stride(0),
        PAGE_TOKENS=page_tokens, PAGED=pool is not None, APPROXIMATE=approximate,
        W=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _project(
    x_map, weight_map, bias_ptr, target_ptr, mixed_ptr, pages_ptr, rows, depth, layer_offset, side_stride, page_stride,
    PAGE_TOKENS: tl.constexpr, PAGED: tl.constexpr, APPROXIMATE: tl.constexpr, W: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_row, first_column = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), dtype=tl.float32)
    for k in tl.range(0, depth, K, num_stages=STAGES):
        total = tl.dot(x_map.load([first_row, k]), weight_map.load([k, first_column]), total)
    row, column = first_row + tl.arange(0, M), first_column + tl.arange(0, N)
    total += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    value = _silu(total, APPROXIMATE).to(mixed_ptr.dtype.element_ty)
    inside = (row < rows)[:, None]
    tl.store(mixed_ptr + row[:, None].to(tl.int64) * (4 * W) + column[None, :], value, mask=inside)
    part = first_column // W  # 0 u, 1 v, 2 q, 3 k: a tile lies in one of them
    if PAGED and (part == 1 or part == 3):
        target = tl.load(target_ptr + row, mask=row < rows, other=-1)
        if tl.max(target, 0) >= 0:
            token = (target // PAGE_TOKENS).to(tl.int64) * page_stride + (target % PAGE_TOKENS).to(tl.int64) * W
            side = tl.where(part == 3, 0, side_stride)  # a page holds K, then V
            into = layer_offset + token[:, None] + (side + column - part * W)[None, :]
            tl.store(pages_ptr + into, value, mask=inside & (target >= 0)[:, None])


def fusable(rows: int, width: int) -> bool:
    """Whether `project` is both possible (tiles of one part) and quicker than a library's product and `silu_pages`."""
    return rows <= FUSED_ROWS and width % (64 if rows <= 512 else 128) == 0


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    mixed: torch.Tensor,
    pool: torch.Tensor | None,
    layer: int,
    *,
    approximate: bool = True,
) -> None:
    """mixed [T, 4 w] = SiLU(x weight + bias), and its k and v of rows with a target into `pool`, as `silu_pages`.

    x [T, d], weight [d, 4 w], both contiguous. Sums run in one fixed order, whatever T.
    """
    rows, depth = x.shape
    columns = weight.shape[1]
    width = columns // 4
    assert fusable(rows, width) and mixed.shape == (rows, columns) and weight.shape[0] == depth
    assert x.is_contiguous() and weight.is_contiguous() and mixed.is_contiguous() and len(target) >= rows
    m, n, stages, warps = (64, 64, 4, 4) if rows <= 512 else (128, 128, 3, 8)
    page_tokens = 1 if pool is None else pool.shape[3]
    _project[(triton.cdiv(rows, m), columns // n)](
        TensorDescriptor.from_tensor(x, [m, 64]), TensorDescriptor.from_tensor(weight, [64, n]),
        bias, target, mixed, mixed if pool is None else pool, rows, depth,
        0 if pool is None else layer * pool.stride(1), page_tokens * width, 0 if pool is None else pool.stride(0),
        PAGE_TOKENS=page_tokens, PAGED=pool is not None, APPROXIMATE=approximate,
        W=width, M=m, N=n, K=64, STAGES=stages, num_warps=warps,
    )  # fmt: skip
