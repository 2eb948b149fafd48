"""The host's formats: what lies where, what is lost, and Triton against the reference to the last bit."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from mtserve.errors import InvalidArgument
from mtserve.kernels.host_format import reference, triton
from mtserve.kernels.host_format.shape import FORMATS, SMALLEST_PEAK, FormatShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
LOSSY = FORMATS[1:]
# Triton's interpreter cuts off what a device rounds when it turns fp32 into bf16.
ROUNDED = TYPES if DEVICE == "cuda" else TYPES[:2]
DECODED = [(format, dtype) for format in FORMATS for dtype in TYPES if format == "kv" or dtype in ROUNDED]
LAYERS, PAGES, LAYER = 3, 4, 1
SIZES = [(1, 8, 32), (3, 24, 96), (2, 48, 160)]  # heads, head_dim, d
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

# The interpreter's numpy warns of what becomes infinite or NaN, which is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def _shape(
    format: str, size: tuple[int, int, int] = SIZES[1], *, page_tokens: int = 5, dtype: torch.dtype = torch.float32
) -> FormatShape:
    return FormatShape(format, LAYERS, page_tokens, *size, dtype)


def _packed(shape: FormatShape) -> torch.Tensor:
    """Pages of 0xFF: NaN in every type, peaks included."""
    return torch.full((PAGES, shape.bytes), 255, dtype=torch.uint8, device=DEVICE)


def _rows(shape: FormatShape, tokens: int) -> tuple[torch.Tensor, ...]:
    """A tensor a side, rows apart, as the projection's output has them; a wide range of magnitudes among them."""
    magnitude = 10.0 ** torch.randint(-3, 4, (tokens, 3, *(1 for _ in shape.row)), device=DEVICE)
    mixed = torch.randn(tokens, 3, *shape.row, device=DEVICE) * magnitude
    return tuple(mixed.to(shape.dtype).unbind(1)[: shape.sides])


def _targets(shape: FormatShape, tokens: int) -> torch.Tensor:
    """Distinct places in any order, every fifth or so of them none."""
    places = torch.randperm(PAGES * shape.page_tokens)[:tokens].to(torch.int32)
    places[torch.rand(tokens) < 0.2] = -1
    return places.to(DEVICE)


def _out(shape: FormatShape) -> torch.Tensor:
    """All NaN: the device's pool with layers to spare, or rows with columns to spare."""
    sizes: tuple[int, ...] = (PAGES * shape.page_tokens, shape.d + 8)
    if shape.sides == 2:
        sizes = (PAGES, LAYERS + 2, 2, shape.page_tokens, *shape.row)
    return torch.full(sizes, float("nan"), dtype=shape.dtype, device=DEVICE)


def _part(shape: FormatShape, out: torch.Tensor) -> torch.Tensor:
    """What of it rows are decoded to."""
    return out[:, :LAYERS] if shape.sides == 2 else out[:, : shape.d]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(WORDS.get(tensor.dtype, torch.uint8)).cpu()


def _through(shape: FormatShape, *rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed pages of `rows`, all in order, and what the rows of the first side come back as."""
    tokens = len(rows[0])
    packed = torch.zeros(-(-tokens // shape.page_tokens), shape.bytes, dtype=torch.uint8)
    place = torch.arange(tokens, dtype=torch.int32)
    reference.encode_rows(shape, rows, packed, place, 0)
    if shape.sides == 1:
        out = torch.empty_like(rows[0])
        reference.decode_rows(shape, packed, place, 0, out, place)
        return packed, out
    pool = rows[0].new_empty(len(packed), shape.layers, 2, shape.page_tokens, *shape.row)
    reference.decode_rows(shape, packed, place, 0, pool, place)
    return packed, pool[:, 0, 0].flatten(0, 1)[:tokens]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_triton_encodes_the_references_bytes_and_no_others(
    format: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    shape = _shape(format, size, dtype=dtype)
    patterns = torch.randint(-(2**15), 2**15, (10, shape.sides, *shape.row, dtype.itemsize // 2), dtype=torch.int16)
    any_bits = patterns.view(dtype).reshape(10, shape.sides, *shape.row).to(DEVICE).unbind(1)
    for rows in (_rows(shape, 13), any_bits):
        rows[0][3].zero_()
        rows[-1][5].view(-1)[0] = float("inf")
        rows[-1][7].view(-1)[-1] = float("nan")
        target = _targets(shape, len(rows[0]))
        got, truth = _packed(shape), _packed(shape).cpu()
        triton.encode_rows(shape, rows, got, target, LAYER)
        reference.encode_rows(shape, [side.cpu() for side in rows], truth, target.cpu(), LAYER)
        assert torch.equal(got.cpu(), truth)


@pytest.mark.parametrize(("format", "dtype"), DECODED)
@pytest.mark.parametrize("size", SIZES)
def test_triton_decodes_the_references_rows_and_no_others(
    format: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    shape = _shape(format, size, dtype=dtype)
    rows, packed = [side.cpu() for side in _rows(shape, 13)], _packed(shape).cpu()
    rows[-1][7].view(-1)[-1] = float("nan")
    place = _targets(shape, 13)
    reference.encode_rows(shape, rows, packed, place.cpu(), LAYER)
    source, target = place.flip(0).contiguous(), _targets(shape, 13)
    got, truth = _out(shape), _out(shape).cpu()
    triton.decode_rows(shape, packed.to(DEVICE), source, LAYER, _part(shape, got), target)
    reference.decode_rows(shape, packed, source.cpu(), LAYER, _part(shape, truth), target.cpu())
    assert truth.isnan().any() and not truth.isnan().all()
    assert torch.equal(got.cpu().isnan(), truth.isnan())
    assert torch.equal(_bits(got.nan_to_num(0.0)), _bits(truth.nan_to_num(0.0)))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_own_their_bytes(format: str) -> None:
    shape = _shape(format)
    rows, packed = [side.cpu() for side in _rows(shape, 3)], _packed(shape).cpu()
    target = torch.tensor([2 * shape.page_tokens + 4, -1, 2 * shape.page_tokens], dtype=torch.int32)
    reference.encode_rows(shape, rows, packed, target, LAYER)
    owned = torch.zeros_like(packed)
    shape.payload(owned, LAYER)[2, :, [0, 4]] = 1
    if not shape.lossless:
        shape.peaks(owned, LAYER).view(torch.int16)[2, :, [0, 4]] = 0x0101
    assert int(owned.sum()) == 2 * shape.sides * (shape.row_bytes + (0 if shape.lossless else 2 * shape.groups))
    assert (packed[owned == 0] == 255).all()
    alone = _packed(shape).cpu()
    reference.encode_rows(shape, [side[2:] for side in rows], alone, target[2:], LAYER)
    reference.encode_rows(shape, [side[:2] for side in rows], alone, target[:2], LAYER)
    assert torch.equal(alone, packed)


@pytest.mark.parametrize(
    ("format", "layer_bytes"), [("kv", 131072), ("kv8", 65536 + 1024), ("x8", 32768 + 128), ("x4", 16384 + 2048)]
)
def test_bytes_of_a_page(format: str, layer_bytes: int) -> None:
    shape = FormatShape(format, 8, 64, 4, 128, 512, torch.bfloat16)
    assert (shape.layer_bytes, shape.bytes) == (layer_bytes, 8 * layer_bytes)


@pytest.mark.parametrize("page_tokens", [1, 3, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_layers_follow_each_other_aligned(format: str, size: tuple[int, int, int], page_tokens: int) -> None:
    shape = _shape(format, size, page_tokens=page_tokens)
    packed = torch.zeros(1, shape.bytes, dtype=torch.uint8)
    reference.encode_rows(shape, [x.cpu() for x in _rows(shape, 1)], packed, torch.zeros(1, dtype=torch.int32), LAYER)
    first = shape.layer_bytes * LAYER
    assert packed[:, first : first + shape.layer_bytes].any()
    assert not packed[:, :first].any() and not packed[:, first + shape.layer_bytes :].any()
    assert shape.layer_bytes % 16 == shape.peaks_offset % 16 == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_lossless_pages_are_the_pools_bytes(dtype: torch.dtype) -> None:
    shape = _shape("kv", dtype=dtype)
    tokens = 2 * shape.page_tokens
    words = [torch.randint(-(2**15), 2**15, (tokens, *shape.row), dtype=WORDS[dtype]) for _ in range(2)]  # NaN too
    k, v = (word.view(dtype) for word in words)
    pool = torch.zeros(PAGES, LAYERS, 2, shape.page_tokens, *shape.row, dtype=dtype)
    place = shape.places(torch.tensor([3, 1]), 0, tokens)
    pool[[3, 1], LAYER] = torch.stack((k, v)).unflatten(1, (2, -1)).transpose(0, 1)
    packed = torch.zeros(PAGES, shape.bytes, dtype=torch.uint8)
    reference.encode_rows(shape, (k, v), packed, place, LAYER)
    assert torch.equal(packed, pool.flatten(1).view(torch.uint8))
    back = torch.zeros_like(pool)
    reference.decode_rows(shape, packed, place, LAYER, back, place)
    assert torch.equal(_bits(back), _bits(pool))


def test_places_follow_the_pages_of_a_history() -> None:
    assert _shape("x8").places(torch.tensor([7, 0, 2]), 3, 11).tolist() == [38, 39, 0, 1, 2, 3, 4, 10]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("format", "low", "high"),
    [("kv", 0.0, 0.0), ("kv8", 6.3e-3, 6.7e-3), ("x8", 7.3e-3, 7.7e-3), ("x4", 0.096, 0.098)],
)
def test_error_of_normal_rows(format: str, low: float, high: float, dtype: torch.dtype) -> None:
    shape = FormatShape(format, 1, 64, 4, 128, 512, dtype)
    x = torch.randn(512, *shape.row).to(dtype)
    _, back = _through(shape, *(x for _ in range(shape.sides)))
    assert low <= float((back.float() - x.float()).norm() / x.float().norm()) <= high


@pytest.mark.parametrize("format", LOSSY)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 6e4, 3e38])
def test_error_is_half_a_code_at_any_magnitude(format: str, magnitude: float) -> None:
    shape = _shape(format)
    x = (torch.rand(50, *shape.row) * 2 - 1) * magnitude
    _, back = _through(shape, *(x for _ in range(shape.sides)))
    groups = (-1, shape.groups, shape.group)
    peak = x.reshape(groups).abs().amax(-1, keepdim=True)
    assert ((back - x).reshape(groups).abs() <= 0.505 / shape.levels * peak).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", LOSSY)
def test_largest_number_of_a_type_stays_finite(format: str, dtype: torch.dtype) -> None:
    shape = _shape(format, dtype=dtype)
    x = torch.full((2, *shape.row), torch.finfo(dtype).max, dtype=dtype)
    x[1].neg_()
    packed, back = _through(shape, *(x for _ in range(shape.sides)))
    torch.testing.assert_close(back, x, rtol=0.004, atol=0.0)
    assert torch.equal(_through(shape, *(back for _ in range(shape.sides)))[0], packed)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", LOSSY)
def test_zeros_stay_exact_and_what_is_not_finite_shows(format: str, dtype: torch.dtype) -> None:
    shape = _shape(format, dtype=dtype)
    x = torch.randn(6, shape.groups, shape.group).to(dtype)
    x[0] = 0.0
    x[1] = SMALLEST_PEAK / 2  # 0 in fp16
    x[2, :, 0], x[3, :, 1], x[4, :, 2] = float("inf"), -float("inf"), float("nan")
    x[5, 0, 3] = float("nan")  # one group alone
    rows = x.reshape(6, *shape.row)
    _, back = _through(shape, *(rows for _ in range(shape.sides)))
    back = back.reshape(x.shape)
    assert not _bits(back[:2]).any()
    assert back[2:5].isnan().all() and back[5, 0].isnan().all()
    assert back[5, 1:].isfinite().all()


def _patterns(dtype: torch.dtype) -> st.SearchStrategy[list[int]]:
    """Bit patterns: of any number of the type, or all of one exponent, so that the codes differ."""
    bits = 8 * dtype.itemsize
    kept = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}[dtype]
    low, span = -(1 << bits - 1), 1 << kept + 2
    near = st.integers(low, -low - span).flatmap(lambda first: _lists(first, first + span - 1))
    return _lists(low, -low - 1) | near


def _lists(low: int, high: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(low, high), min_size=64, max_size=64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", LOSSY)
@given(data=st.data())
def test_encoding_what_was_decoded_changes_no_byte(format: str, dtype: torch.dtype, data: st.DataObject) -> None:
    shape = FormatShape(format, 1, 2, 2, 16, 32, dtype)
    x = torch.tensor(data.draw(_patterns(dtype)), dtype=WORDS[dtype]).view(dtype).reshape(2, *shape.row)
    packed, back = _through(shape, *(x for _ in range(shape.sides)))
    again, twice = _through(shape, *(back for _ in range(shape.sides)))
    assert torch.equal(again, packed)
    assert torch.equal(_bits(twice), _bits(back))


@pytest.mark.parametrize("levels", [127, 7])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_of_every_peak_survives_its_types_rounding(dtype: torch.dtype, levels: int) -> None:
    peaks = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)  # every finite one
    largest, smallest = torch.finfo(dtype).max, max(SMALLEST_PEAK, 2.0**-17 if dtype is torch.float16 else 0.0)
    peaks = peaks[(peaks.float() >= smallest) & (peaks.float() <= largest)]
    codes = torch.arange(-levels, levels + 1, dtype=torch.int8).expand(len(peaks), -1)
    got_codes, got_peaks = reference.quantise(reference.dequantise(codes, peaks, levels).to(dtype), levels)
    assert torch.equal(got_codes, codes) and torch.equal(got_peaks, peaks)


@pytest.mark.parametrize(
    ("field", "value"), [("format", "kv4"), ("layers", 0), ("d", 100), ("head_dim", -1), ("dtype", torch.float64)]
)
def test_shapes_that_cannot_be(field: str, value: object) -> None:
    sizes = {"format": "x4", "layers": 1, "page_tokens": 1, "heads": 1, "head_dim": 8, "d": 32, "dtype": torch.float16}
    with pytest.raises(InvalidArgument, match=field):
        FormatShape(**{**sizes, field: value})
