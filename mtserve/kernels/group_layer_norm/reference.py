"""Group layer norm (GLN), the truth: layer norm whose affine parameters belong to the row's token group (MTGR, 2025)."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def group_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[T, d] normalised rows of x [T, d]; weight, bias [groups, d]; group int64 [T]."""
    x = x.float().cpu()
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    rows = group.cpu()
    return (x - mean) / torch.sqrt(variance + EPSILON) * weight.float().cpu()[rows] + bias.float().cpu()[rows]
