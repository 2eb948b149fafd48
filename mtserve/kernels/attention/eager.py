"""HSTU attention in plain torch operations: any device, any dtype, one user slot after the other."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from mtserve.kernels.page_write.rounding import movable
from mtserve.kernels.plan import KernelPlan

# Query rows of one tile. Rows of a tile look at keys up to the tile's largest limit only, so
# smaller tiles skip more of a causal triangle; larger ones make better matrix products.
TILE_ROWS = 256


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor | None, plan: KernelPlan, n: int
) -> torch.Tensor:
    """[T, H, D] outputs of new rows `q`, `k`, `v` [T, H, D] over pages [pages, 2, page_tokens, H, D] and each other.

    Pages have the rows' type or fp8.
    """
    out = torch.empty_like(q)
    limits = plan.limit.tolist()
    for slot, (begin, end) in enumerate(zip(plan.row_offsets, plan.row_offsets[1:], strict=False)):
        keys, values = _prefix(k, v, pages, plan, slot)
        for first in range(begin, end, TILE_ROWS):
            last = min(first + TILE_ROWS, end)
            visible = max(limits[first:last])
            _tile(out[first:last], q[first:last], keys[:, :visible], values[:, :visible], plan.limit[first:last], n)
        first_candidate = begin + plan.delta[slot]
        if first_candidate < end:
            _add_self(
                out[first_candidate:end], q[first_candidate:end], k[first_candidate:end], v[first_candidate:end], n
            )
    return out


def _prefix(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor | None, plan: KernelPlan, slot: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, cached + delta, D] of one slot's prefix."""
    begin, cached, delta = plan.row_offsets[slot], plan.cached[slot], plan.delta[slot]
    new = torch.stack((k[begin : begin + delta], v[begin : begin + delta]))
    if cached:
        assert pages is not None
        ids = plan.page_table[slot, : -(-cached // plan.page_tokens)]
        # Tokens past `cached` of the last page may hold anything, NaN included: cut before computing.
        old = movable(pages).index_select(0, ids).view(pages.dtype).to(k.dtype)
        new = torch.cat((old.transpose(0, 1).flatten(1, 2)[:, :cached], new), dim=1)
    keys, values = new.transpose(1, 2).contiguous()
    return keys, values


def _tile(
    out: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, limit: torch.Tensor, n: int
) -> None:
    """Write one tile: out, q [rows, H, D]; keys, values [H, visible, D]; limit [rows]."""
    weights = silu(torch.bmm(q.transpose(0, 1) * q.shape[-1] ** -0.5, keys.transpose(1, 2)), inplace=True)
    hidden = torch.arange(keys.shape[1], device=q.device) >= limit[:, None]
    weights.masked_fill_(hidden, 0.0)
    out.copy_(torch.bmm(weights, values).transpose(0, 1) / n)


def _add_self(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int) -> None:
    """Add what each candidate sees of itself; all [candidates, H, D]."""
    weight = silu((q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5)
    out.add_(weight * v / n)
