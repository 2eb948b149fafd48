"""The task heads in Triton against their reference: through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from mtserve.kernels.task_heads.reference import task_heads as truth
from mtserve.kernels.task_heads.triton import task_heads
from mtserve.kernels.task_heads.weights import Head, pack_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch.backends.cuda.matmul.allow_tf32 = False


def _rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _heads(tasks: int, d: int, dtype: torch.dtype = torch.float32) -> list[Head]:
    h = d // 2
    return [
        Head(*((_rand(*shape) * scale).to(dtype) for shape, scale in (((h, d), d**-0.5), ((h,), 1), ((1, h), h**-0.5), ((1,), 1))))
        for _ in range(tasks)
    ]  # fmt: skip


def _rows(rows: int, d: int, first: int, candidates: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with NaN in every row that is no candidate's, the candidates' rows, and their counts."""
    row = torch.randint(0, rows, (rows,), dtype=torch.int32, device=DEVICE)
    row[first : first + candidates] = torch.randperm(rows)[:candidates].to(torch.int32).to(DEVICE)
    x = torch.full((rows, d), NAN, device=DEVICE)
    x[row[first : first + candidates].long()] = _rand(candidates, d)
    return x, row, torch.tensor([first, candidates], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("tasks", "d"), [(1, 64), (3, 72), (2, 200), (2, 520)])
def test_logits_of_the_candidates_and_no_others(tasks: int, d: int) -> None:
    heads, offset = _heads(tasks, d), _rand(d)
    packed = pack_heads(heads)
    for first, candidates in ((3, 0), (0, 1), (17, 100)):
        x, row, counts = _rows(130, d, first, candidates)
        logits = torch.full((130, tasks), NAN, device=DEVICE)
        task_heads(packed, x, offset, row, counts, logits, approximate=False)
        expected = torch.full((130, tasks), NAN)
        truth(heads, x, offset, row, counts, expected)
        assert int(expected.isnan().sum()) == (130 - candidates) * tasks
        torch.testing.assert_close(logits.cpu(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of rows that are masked
def test_the_offset_is_added_before_the_rounding_to_half() -> None:
    heads, offset = _heads(2, 96, torch.float16), _rand(96) + 1000
    x, row, counts = _rows(70, 96, 2, 66)
    x = (x * 0 - 1000).half()
    logits, expected = torch.full((70, 2), NAN, device=DEVICE), torch.full((70, 2), NAN)
    task_heads(pack_heads(heads), x, offset, row, counts, logits, approximate=False)
    truth(heads, x, offset, row, counts, expected)
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_logit_does_not_depend_on_other_candidates() -> None:
    heads, offset = pack_heads(_heads(2, 72)), _rand(72)
    x, row, counts = _rows(130, 72, 4, 100)
    every, few = torch.zeros(130, 2, device=DEVICE), torch.zeros(40, 2, device=DEVICE)
    task_heads(heads, x, offset, row, counts, every, approximate=False)
    # The interpreter's products come from a CPU library that sums by place: there, candidates stay in theirs.
    skipped = 64 if DEVICE == "cpu" else 61
    some = torch.tensor([4 + skipped, 30], dtype=torch.int32, device=DEVICE)
    task_heads(heads, x, offset, row, some, few, approximate=False)
    assert torch.equal(few[:30], every[skipped : skipped + 30])
    assert not few[30:].any()
