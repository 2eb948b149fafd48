"""The rows of a split batch that go on after its first layers, the truth."""

from __future__ import annotations

import torch


def late_rows(x: torch.Tensor, early: torch.Tensor, late: torch.Tensor, count: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, d]: of each slot the last rows of x [rows, d], as many as it has in `late`; and no other rows of out.

    `early`, `late` int32 [at least B, 4]: cached, delta, first row, rows of each slot, in x and in out; `count` int32
    [1]: B. A slot has as many rows in `early` as in `late` or more; slots lie one behind the other.
    """
    for slot in range(int(count)):
        (_, _, first, rows), (_, _, to, kept) = early[slot].tolist(), late[slot].tolist()
        out[to : to + kept] = x[first + rows - kept : first + rows]
