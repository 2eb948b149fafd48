"""Page write, the truth: one row at a time."""

from __future__ import annotations

import torch

from mtserve.kernels.plan import KernelPlan


def page_write(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, plan: KernelPlan) -> None:
    """Store the plan's rows of k, v [T, H, D] into pages [pages, 2, page_tokens, H, D], in place.

    Pages of fp8 take rows that are `rounded` for them.
    """
    for row, page, offset in zip(plan.write_rows, plan.write_pages, plan.write_offsets, strict=True):
        pages[page, 0, offset] = k[row].to(pages.dtype)
        pages[page, 1, offset] = v[row].to(pages.dtype)
