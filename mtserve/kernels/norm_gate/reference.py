"""Norm and gate, the truth: GLN(Y) * u, or GLN(Y * u) as the MTGR paper states it."""

from __future__ import annotations

import torch

from mtserve.kernels.group_layer_norm.reference import group_layer_norm


def norm_gate(
    y: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, group: torch.Tensor, gate_first: bool
) -> torch.Tensor:
    """[T, w] gated rows of attention output y and gate u, both [T, w]; weight, bias [groups, w]; group int64 [T]."""
    y, u = y.float().cpu(), u.float().cpu()
    if gate_first:
        return group_layer_norm(y * u, weight, bias, group)
    return group_layer_norm(y, weight, bias, group) * u
