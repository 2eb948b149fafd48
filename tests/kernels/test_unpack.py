"""K and V from packed pages: the reference against codes and peaks written by hand, and what the kernel refuses."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.cuda.build import source
from mtserve.kernels.cuda.driver import TENSOR_MAP_BYTES
from mtserve.kernels.host_format.reference import encode_rows
from mtserve.kernels.host_format.shape import FormatShape
from mtserve.kernels.unpack.cuda import MOST_PAGES, Params, UnpackKernel
from mtserve.kernels.unpack.reference import FORMATS, unpack_pages

PAGES, LAYERS, LAYER, TOKENS = 6, 3, 1, 5
LISTED = [4, 0, 3]
SIZES = [(1, 8, 32), (3, 24, 96), (2, 7, 160)]  # heads, head_dim, d
TYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


class Case:
    """Packed pages of random codes and peaks, LISTED to be unpacked at LAYER into a pool of -1; the rest is NaN."""

    def __init__(self, format: str, size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape = FormatShape(format, LAYERS, TOKENS, *size, dtype)
        width = shape.heads * shape.head_dim
        self.packed = torch.full((PAGES, shape.bytes), 255, dtype=torch.uint8)
        self.codes = torch.randint(-shape.levels, shape.levels + 1,
                                   (len(LISTED), shape.sides, TOKENS, shape.groups, shape.group))  # fmt: skip
        self.peaks = (torch.rand(len(LISTED), shape.sides, TOKENS, shape.groups) + 0.5).bfloat16()
        flat = self.codes.flatten(3)
        stored = flat if shape.bits == 8 else (flat[..., 0::2] & 15) + 16 * (flat[..., 1::2] & 15)
        shape.payload(self.packed, LAYER)[LISTED] = (stored & 255).to(torch.uint8)
        shape.peaks(self.packed, LAYER)[LISTED] = self.peaks
        self.weight, self.bias = torch.randn(shape.d, 4 * width).to(dtype), torch.randn(4 * width).to(dtype)
        self.pool = torch.full((PAGES, LAYERS, 2, TOKENS, *size[:2]), -1.0, dtype=dtype)

    def run(self) -> torch.Tensor:
        unpack_pages(
            self.shape, self.packed, torch.tensor(LISTED), LAYER, self.weight, self.bias, self.pool
        )  # fmt: skip
        return self.pool[LISTED, LAYER]

    def expected(self) -> torch.Tensor:
        """[listed, 2, tokens, H, D] in fp64."""
        heads = (self.shape.heads, self.shape.head_dim)
        values = (self.codes * self.peaks.double().unsqueeze(-1) / self.shape.levels).flatten(3)
        if self.shape.sides == 2:
            return values.unflatten(3, heads)
        product = values[:, 0] @ self.weight.double() + self.bias.double()
        _, v, _, k = (product / (1 + torch.exp(-product))).unflatten(2, (4, *heads)).unbind(2)
        return torch.stack((k, v), 1)


@every_format
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_states_are_those_of_the_codes_and_nothing_else_is_written(
    format: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    case = Case(format, size, dtype)
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=tolerance, atol=tolerance)
    rest = torch.ones(PAGES, LAYERS, dtype=torch.bool)
    rest[LISTED, LAYER] = False
    assert (case.pool[rest] == -1).all()


@every_format
def test_rows_that_were_encoded_come_back_close(format: str) -> None:
    shape = FormatShape(format, LAYERS, TOKENS, 2, 16, 64, torch.float32)
    packed, pool = torch.zeros(2, shape.bytes, dtype=torch.uint8), torch.full((2, LAYERS, 2, TOKENS, 2, 16), NAN)
    x, weight, bias = torch.randn(TOKENS, 64), torch.randn(64, 128) / 8, torch.randn(128)
    _, v, _, k = torch.nn.functional.silu(x @ weight + bias).unflatten(1, (4, 2, 16)).unbind(1)
    rows = (k, v) if shape.sides == 2 else (x,)
    encode_rows(shape, rows, packed, torch.arange(TOKENS, dtype=torch.int32) + TOKENS, LAYER)
    unpack_pages(shape, packed, torch.tensor([1], dtype=torch.int32), LAYER, weight, bias, pool)
    expected = torch.stack((k, v))
    error = (pool[1, LAYER] - expected).norm() / expected.norm()
    assert 0 < error < 2 / shape.levels
    assert pool[0].isnan().all()


@every_format
def test_a_nan_peak_gives_nan_states(format: str) -> None:
    case = Case(format, SIZES[1])
    case.shape.peaks(case.packed, LAYER)[LISTED[1], 0, 2, 0] = NAN
    isnan = case.run().isnan()
    expected = torch.zeros_like(isnan)
    if format == "kv8":
        expected[1, 0, 2, 0] = True
    else:
        expected[1, :, 2] = True
    assert torch.equal(isnan, expected)


def test_other_formats_are_refused() -> None:
    case = Case("kv8", SIZES[0])
    case.shape = replace(case.shape, format="kv")
    with pytest.raises(InvalidArgument) as caught:
        case.run()
    assert caught.value.field == "format"


def test_a_launch_fits_into_its_parameters_and_its_source_is_one_text() -> None:
    assert TENSOR_MAP_BYTES + ctypes.sizeof(Params) <= 4096
    for name in ("rebuild", "unpack"):
        text = source(name)
        assert f"MOST_PAGES = {MOST_PAGES};" in text
        assert "#include" not in text


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("format", {"format": "kv"}),
        ("dtype", {"dtype": torch.float32}),
        ("page_tokens", {"page_tokens": 32}),
        ("width", {"heads": 1, "head_dim": 12}),
        ("d", {"d": 36}),
        ("head_dim", {"format": "kv8", "head_dim": 4}),
        ("pool", {"layers": 2}),
        ("device", {}),
    ],
)
def test_what_the_kernel_cannot_do_is_named(field: str, change: dict[str, object]) -> None:
    shape = replace(FormatShape("x8", LAYERS, 64, 2, 8, 32, torch.bfloat16), **change)
    packed = torch.zeros(1, shape.bytes, dtype=torch.uint8)
    pool = torch.zeros(1, LAYERS, 2, 64, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument) as caught:
        UnpackKernel(shape, packed, pool)
    assert caught.value.field == field
