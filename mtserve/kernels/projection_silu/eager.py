"""Projection and SiLU in plain torch operations: any device."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def projection_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[T, w] of rows x [T, d]; weight [d, w]; bias [w]."""
    return silu(torch.addmm(bias, x, weight), inplace=True)
