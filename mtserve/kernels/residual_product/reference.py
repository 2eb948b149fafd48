"""Output product and residual, the truth: X + G W."""

from __future__ import annotations

import torch


def residual_product(x: torch.Tensor, gated: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, d] of x [T, d], gated [T, w] and weight [w, d]."""
    return x.float().cpu() + gated.float().cpu() @ weight.float().cpu()
