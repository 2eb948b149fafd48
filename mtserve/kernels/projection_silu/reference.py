"""Projection and SiLU, the truth: SiLU(X W + b)."""

from __future__ import annotations

import torch


def projection_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[T, w] of rows x [T, d]; weight [d, w]; bias [w]."""
    product = x.float().cpu() @ weight.float().cpu() + bias.float().cpu()
    return product * torch.sigmoid(product)
