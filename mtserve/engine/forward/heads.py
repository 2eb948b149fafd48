"""A model's task heads by the GPU's kernel: from the rows of x to logits."""

from __future__ import annotations

import torch
from torch import nn

from mtserve.kernels.task_heads.triton import task_heads
from mtserve.kernels.task_heads.weights import Head, pack_heads
from mtserve.model.ranking import RankingModel


class TaskHeads:
    """One launch on the current stream, capturable: no allocation, nothing read back, a grid of fixed size.

    Memory, in values of the model's type: copies of the heads' weights, for each task about d d / 2, the d / 2
    rounded up to a multiple of 128 (of a smaller power of two where it is smaller).
    """

    def __init__(self, model: RankingModel, *, approximate: bool = True) -> None:
        """`approximate`: the hardware's tanh in SiLU; False for checks in fp32, and under Triton's interpreter."""
        self._approximate = approximate
        self._packed = pack_heads([_head(model.heads[task]) for task in model.config.tasks])

    def run(
        self, x: torch.Tensor, offset: torch.Tensor, row: torch.Tensor, counts: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Write logits fp32 [capacity, tasks] of the candidates, in the order of `row`; the rest stays as it is.

        x [rows, d] in the model's type, to whose rows `offset` fp32 [d] is added first. counts int32 [2]: first
        candidate in `row` int32 [T], and how many there are, at most the logits' capacity.
        """
        task_heads(self._packed, x, offset, row, counts, logits, approximate=self._approximate)


def _head(module: nn.Module) -> Head:
    assert isinstance(module, nn.Sequential)
    hidden, _, output = module
    assert isinstance(hidden, nn.Linear) and isinstance(output, nn.Linear)
    return Head(hidden.weight.detach(), hidden.bias.detach(), output.weight.detach(), output.bias.detach())
