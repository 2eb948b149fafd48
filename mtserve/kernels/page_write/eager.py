"""Page write in plain torch operations: any device."""

from __future__ import annotations

import torch

from mtserve.kernels.page_write.rounding import movable
from mtserve.kernels.plan import KernelPlan


def page_write(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, plan: KernelPlan) -> None:
    """Store the plan's rows of k, v [T, H, D] into pages [pages, 2, page_tokens, H, D], in place.

    Pages of fp8 take rows that are `rounded` for them.
    """
    if len(plan.write_rows):
        to = movable(pages)
        for side, rows in enumerate((k, v)):
            kept = rows.index_select(0, plan.write_rows).to(pages.dtype)
            to[plan.write_pages, side, plan.write_offsets] = movable(kept)
