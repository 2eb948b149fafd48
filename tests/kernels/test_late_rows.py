"""The rows that go on after a split batch's first layers, in Triton against their reference."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from mtserve.kernels.late_rows.reference import late_rows as truth
from mtserve.kernels.late_rows.triton import late_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _slots(rows: list[int], capacity: int) -> torch.Tensor:
    """Slots of so many rows each; what lies behind them is of an earlier batch."""
    slots = torch.full((capacity, 4), 3, dtype=torch.int32)
    first = 0
    for slot, count in enumerate(rows):
        slots[slot, 2:] = torch.tensor([first, count], dtype=torch.int32)
        first += count
    return slots.to(DEVICE)


@pytest.mark.parametrize("d", [8, 32, 520])
@pytest.mark.parametrize(
    ("early", "late"),
    [([5], [5]), ([9], [1]), ([7, 3, 30], [2, 3, 11]), ([4, 6, 1, 9], [4, 1, 1, 8]), ([3, 5, 2], [3, 0, 2]), ([], [])],
)
def test_the_last_rows_of_each_slot_and_no_others(early: list[int], late: list[int], d: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(sum(early) + 5, d, device=DEVICE)
    count = torch.tensor([len(late)], dtype=torch.int32, device=DEVICE)
    out = torch.full((sum(late) + 6, d), -7.0, device=DEVICE)
    expected = out.clone()
    truth(x, _slots(early, 6), _slots(late, 6), count, expected)
    late_rows(x, _slots(early, 6), _slots(late, 6), count, out)
    assert torch.equal(out, expected)
    assert bool((out[sum(late) :] == -7.0).all())
