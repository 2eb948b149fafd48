"""The task heads in one launch: a program scores a few candidates for one task, a chunk of hidden columns at a time.

The grid follows the logits' capacity, so that a captured graph serves any batch: programs behind the last candidate
return at once. Every sum runs in one fixed order, whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mtserve.kernels.task_heads.weights import PackedHeads
from mtserve.kernels.triton_silu import silu

CANDIDATES = 64
DEPTH = 64


@triton.jit
def _task_heads(
    x_ptr, offset_ptr, row_ptr, counts_ptr, weight_ptr, bias_ptr, output_ptr, output_bias_ptr, logits_ptr,
    APPROXIMATE: tl.constexpr, TASKS: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * M
    first, candidates = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    if start >= candidates:
        return
    task = tl.program_id(1)
    candidate = start + tl.arange(0, M)
    inside = candidate < candidates
    row = tl.load(row_ptr + first + candidate, mask=inside, other=0).to(tl.int64)
    element = x_ptr.dtype.element_ty
    k = tl.arange(0, K)
    left_ptr = x_ptr + row[:, None] * D + k[None, :]
    logit = tl.zeros((M,), dtype=tl.float32) + tl.load(output_bias_ptr + task).to(tl.float32)
    for column in range(0, HIDDEN, N):
        n = column + tl.arange(0, N)
        right_ptr = weight_ptr + task.to(tl.int64) * (D * HIDDEN) + k[:, None] * HIDDEN + n[None, :]
        total = tl.zeros((M, N), dtype=tl.float32)
        for depth in range(0, D, K):
            within = depth + k < D
            left = tl.load(left_ptr + depth, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
            left += tl.load(offset_ptr + depth + k, mask=within, other=0.0)[None, :]
            right = tl.load(right_ptr + depth * HIDDEN, mask=within[:, None], other=0.0)
            total = tl.dot(left.to(element), right, total, input_precision="ieee")
        total += tl.load(bias_ptr + task * HIDDEN + n).to(tl.float32)[None, :]
        output = tl.load(output_ptr + task * HIDDEN + n).to(tl.float32)
        logit += tl.sum(silu(total, APPROXIMATE) * output[None, :], 1)
    tl.store(logits_ptr + candidate.to(tl.int64) * TASKS + task, logit, mask=inside)


def task_heads(
    packed: PackedHeads,
    x: torch.Tensor,
    offset: torch.Tensor,
    row: torch.Tensor,
    counts: torch.Tensor,
    logits: torch.Tensor,
    *,
    approximate: bool = True,
) -> None:
    """Writes logits fp32 [candidates or more, tasks] of the candidates, and no others.

    x [rows, d], to which offset fp32 [d] is added, rounded to x's type; row int32 [T]; counts int32 [2]: the
    candidates' rows are row[counts[0]], ... row[counts[0] + counts[1] - 1].
    `approximate`: the hardware's tanh, exact to bf16's last bit or so; False for checks in fp32.
    """
    tasks, d, hidden = packed.hidden_weight.shape
    assert x.shape[1] == d and x.is_contiguous() and x.dtype == packed.hidden_weight.dtype
    assert offset.shape == (d,) and offset.dtype == torch.float32 and row.dtype == counts.dtype == torch.int32
    assert logits.shape[1] == tasks and logits.is_contiguous() and logits.dtype == torch.float32
    _task_heads[(triton.cdiv(len(logits), CANDIDATES), tasks)](
        x, offset, row, counts, packed.hidden_weight, packed.hidden_bias, packed.output_weight, packed.output_bias,
        logits, APPROXIMATE=approximate, TASKS=tasks, D=d, HIDDEN=hidden,
        M=CANDIDATES, N=packed.columns, K=DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip
