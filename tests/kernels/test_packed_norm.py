"""The group layer norm that packs its rows: the bytes that encoding its output writes, and the output it has anyway."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from mtserve.kernels.group_layer_norm.triton import ROWS, group_layer_norm
from mtserve.kernels.host_format import reference
from mtserve.kernels.host_format.packed import PackedPages, PackedRows
from mtserve.kernels.host_format.shape import FormatShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts off what a device rounds when it turns fp32 into bf16.
ROUNDED = TYPES if DEVICE == "cuda" else TYPES[:2]
LAYERS, PAGES, PAGE_TOKENS, LAYER = 3, 5, 5, 1
CASES = [("x8", 8), ("x8", 40), ("x8", 160), ("x4", 32), ("x4", 96), ("x4", 160)]  # format, d
# So many that some products lie so near to half a code that a fused sum would round them otherwise.
MANY = 4000 if DEVICE == "cuda" else 66
NAN = float("nan")

# The interpreter's numpy warns of what becomes infinite or NaN, which is what some rows are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*(encountered in|overflow|invalid value).*:RuntimeWarning")


class Norm:
    """Arguments of the norm over random rows of `d` values, some of them of unlike magnitude."""

    def __init__(self, rows: int, d: int, dtype: torch.dtype) -> None:
        self.x = (torch.randn(rows, d) * 10.0 ** torch.randint(-3, 4, (rows, 1))).to(DEVICE, dtype)
        scale = 10.0 ** torch.randint(-3, 3, (4, d))  # peaks of unlike size in one row
        self.weight, self.bias = (torch.randn(4, d).mul(scale).to(DEVICE, dtype) for _ in range(2))
        self.group = torch.randint(0, 4, (rows,), dtype=torch.int32, device=DEVICE)
        self.offset = torch.randn(d, device=DEVICE)

    def run(self, packed: PackedRows | None = None) -> torch.Tensor:
        out = torch.full_like(self.x, NAN)
        group_layer_norm(self.x, self.weight, self.bias, self.group, self.offset, out, packed)
        return out


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def _untouched(format: str, d: int, pages: int = PAGES, page_tokens: int = PAGE_TOKENS) -> PackedPages:
    """Pages of 0xFF: NaN in every type, peaks included."""
    shape = FormatShape(format, LAYERS, page_tokens, 2, 8, d, torch.float32)
    return PackedPages(shape, torch.full((pages, shape.bytes), 255, dtype=torch.uint8, device=DEVICE))


def _targets(rows: int, places: int = PAGES * PAGE_TOKENS - 1) -> torch.Tensor:
    """Distinct places in any order, every fifth or so of them none; more of them than rows, as a bucket's are."""
    target = torch.randperm(places)[:rows].to(torch.int32)
    target[torch.rand(rows) < 0.2] = -1
    beyond = torch.zeros(ROWS, dtype=torch.int32)  # nothing may go there
    return torch.cat((target, beyond)).to(DEVICE)


def _encoded(packed: PackedPages, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What the reference makes of untouched pages."""
    truth = torch.full_like(packed.pages, 255, device="cpu")
    reference.encode_rows(packed.shape, (out.cpu(),), truth, target[: len(out)].cpu(), LAYER)
    return truth


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("rows", [1, 13, 22])
@pytest.mark.parametrize(("format", "d"), CASES)
def test_packs_the_bytes_of_its_output_and_no_others(format: str, d: int, rows: int, dtype: torch.dtype) -> None:
    norm, packed, target = Norm(rows, d, dtype), _untouched(format, d), _targets(rows)
    target[0] = PAGES * PAGE_TOKENS - 1
    out = norm.run(packed.rows(target, LAYER))
    assert torch.isfinite(out).all()
    assert _same_bits(out, norm.run())
    assert torch.equal(packed.pages.cpu(), _encoded(packed, out, target))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("format", "d"), [("x8", 512), ("x4", 512), ("x8", 768), ("x4", 768)])
def test_packs_pages_of_the_devices_size(format: str, d: int, dtype: torch.dtype) -> None:
    pages = MANY // 64 + 1
    norm, packed, target = Norm(MANY, d, dtype), _untouched(format, d, pages, 64), _targets(MANY, pages * 64)
    out = norm.run(packed.rows(target, LAYER))
    assert _same_bits(out, norm.run())
    assert torch.equal(packed.pages.cpu(), _encoded(packed, out, target))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("format", "d"), [("x8", 40), ("x4", 96)])
def test_packs_zeros_and_what_is_not_finite(format: str, d: int, dtype: torch.dtype) -> None:
    norm, packed = Norm(7, d, dtype), _untouched(format, d)
    norm.x[1, 3], norm.x[2, -1] = float("inf"), NAN
    norm.group[:] = torch.tensor([0, 1, 1, 2, 2, 3, 3])
    norm.weight[2], norm.bias[2] = 0.0, 0.0
    norm.weight[3], norm.bias[3, 5] = 1.0, float("-inf")  # one group alone of x4
    target = torch.arange(7, dtype=torch.int32, device=DEVICE)
    out = norm.run(packed.rows(target, LAYER))
    assert out[1:3].isnan().all() and not out[3:5].any() and out[5:].isinf().sum() == 2
    assert torch.equal(packed.pages.cpu(), _encoded(packed, out, target))
    peaks = packed.shape.peaks(packed.pages, LAYER).flatten(0, 2).isnan().sum(1)[:7]
    every = packed.shape.groups
    assert peaks.tolist() == [0, every, every, 0, 0, 1, 1]


def test_rows_without_a_target_leave_every_byte() -> None:
    norm, packed = Norm(9, 40, torch.float32), _untouched("x8", 40)
    norm.run(packed.rows(torch.full((9,), -1, dtype=torch.int32, device=DEVICE), LAYER))
    assert (packed.pages == 255).all()


@pytest.mark.parametrize(("format", "d"), [("kv8", 40), ("kv", 40), ("x8", 48)])
def test_packs_only_rows_of_the_formats_shape(format: str, d: int) -> None:
    norm, packed = Norm(3, 40, torch.float32), _untouched(format, d)
    with pytest.raises(AssertionError):
        norm.run(packed.rows(_targets(3), LAYER))
