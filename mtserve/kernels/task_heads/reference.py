"""The task heads, the truth: w2 . SiLU(W1 (x + offset) + b1) + b2 for each candidate and task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtserve.kernels.task_heads.weights import Head


def task_heads(
    heads: Sequence[Head],
    x: torch.Tensor,
    offset: torch.Tensor,
    row: torch.Tensor,
    counts: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """Writes logits fp32 [candidates or more, tasks] of the candidates, and no others.

    x [rows, d], to which offset fp32 [d] is added, rounded to x's type; row int32 [T]; counts int32 [2]: the
    candidates' rows are row[counts[0]], ... row[counts[0] + counts[1] - 1].
    """
    first, candidates = counts.tolist()
    rows = x[row[first : first + candidates].long()].float() + offset
    rows = rows.to(x.dtype).float().cpu()
    for task, head in enumerate(heads):
        hidden = rows @ head.hidden_weight.float().cpu().t() + head.hidden_bias.float().cpu()
        output = (hidden * torch.sigmoid(hidden)) @ head.output_weight[0].float().cpu()
        logits[:candidates, task] = (output + head.output_bias.float().cpu()).to(logits.device)
