"""Page write in plain torch operations: any device."""

from __future__ import annotations

import torch

from mtserve.kernels.plan import KernelPlan


def page_write(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, plan: KernelPlan) -> None:
    """Store the plan's rows of k, v [T, H, D] into pages [pages, 2, page_tokens, H, D], in place."""
    if len(plan.write_rows):
        pages[plan.write_pages, 0, plan.write_offsets] = k.index_select(0, plan.write_rows)
        pages[plan.write_pages, 1, plan.write_offsets] = v.index_select(0, plan.write_rows)
