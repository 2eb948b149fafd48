"""Group layer norm in plain torch operations: any device, statistics in fp32."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm

from mtserve.kernels.group_layer_norm.reference import EPSILON


def group_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[T, d] normalised rows of x [T, d]; weight, bias [groups, d]; group int64 [T]."""
    normalised = layer_norm(x.float(), x.shape[-1:], eps=EPSILON)
    return torch.addcmul(bias.index_select(0, group), normalised, weight.index_select(0, group)).to(x.dtype)
