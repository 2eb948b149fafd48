"""The cuda product on Hopper: both epilogues held to fp32, every tile, odd widths and rows, poisoned memory around.

The contract: its relative L2 error against fp32 is at most 1.2 times that of plain torch in the same type, and a
row's result has the same bits whatever the other rows and the tile.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.product.cuda import TILES, Tile, tile_of
from mtserve.kernels.projection_silu import cuda as projection
from mtserve.kernels.projection_silu.cuda import ProjectionKernel
from mtserve.kernels.projection_silu.eager import projection_silu as eager_projection
from mtserve.kernels.projection_silu.reference import projection_silu as projection_truth
from mtserve.kernels.residual_product import cuda as residual
from mtserve.kernels.residual_product.cuda import ResidualKernel
from mtserve.kernels.residual_product.reference import residual_product as residual_truth

pytestmark = pytest.mark.gpu
PAGE, LAYERS, LAYER = 64, 3, 1
NAN = float("nan")
ROWS = [1, 2, 63, 64, 65, 127, 128, 129, 191, 257, 384, 511, 700, 3072]
WIDTHS = [(64, 32), (96, 96), (512, 160), (72, 40), (512, 512), (1024, 1024)]  # d, width
both_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
every_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
widths = pytest.mark.parametrize(("d", "width"), WIDTHS)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(7)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, device=device())).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=device())


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got = got.float().cpu()
    assert torch.isfinite(got).all()
    return float((got - expected).norm() / expected.norm())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN where NaN."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


class Projection:
    """One projection's operands; results lie between rows of NaN, kept rows in pages of NaN."""

    def __init__(self, rows: int, d: int, width: int, dtype: torch.dtype) -> None:
        self.rows, self.width = rows, width
        self.x = random(rows, d, dtype=dtype)
        self.weight, self.bias = random(d, 4 * width, dtype=dtype, scale=d**-0.5), random(4 * width, dtype=dtype)
        pages = rows // PAGE + 3
        self.pool = poisoned(pages, LAYERS, 2, PAGE, 1, width, dtype=dtype)
        places = torch.randperm(pages * PAGE, device=device())[:rows]
        dropped = torch.rand(rows, device=device()) < 0.3
        self.target = torch.where(dropped, -1, places).to(torch.int32)
        self.kernel = ProjectionKernel(d, width, dtype, PAGE, LAYERS, self.pool, device())
        self.around = poisoned(rows + 2, 4 * width, dtype=dtype)
        self.mixed = self.around[1:-1]
        torch.cuda.synchronize()

    def run(self, tile: Tile | None = None) -> torch.Tensor:
        self.kernel.run(self.x, self.weight, self.bias, self.target, self.mixed, LAYER, tile=tile)
        return self.mixed

    def expected_pool(self) -> torch.Tensor:
        """NaN all over, but for the k and v of what was computed where the targets say."""
        pool = torch.full_like(self.pool, NAN)
        kept = self.target >= 0
        page, offset = (self.target[kept] // PAGE).long(), (self.target[kept] % PAGE).long()
        _, v, _, k = self.mixed.view(self.rows, 4, 1, self.width)[kept].unbind(1)
        pool[page, LAYER, 0, offset], pool[page, LAYER, 1, offset] = k, v
        return pool


class Residual:
    def __init__(self, rows: int, width: int, d: int, dtype: torch.dtype) -> None:
        self.gated, self.weight = random(rows, width, dtype=dtype), random(width, d, dtype=dtype, scale=width**-0.5)
        self.x = random(rows, d, dtype=dtype)
        self.kernel = ResidualKernel(width, d, dtype, device())
        torch.cuda.synchronize()

    def run(self, tile: Tile | None = None) -> torch.Tensor:
        around = poisoned(len(self.x) + 2, self.x.shape[1], dtype=self.x.dtype)
        x = around[1:-1]
        x.copy_(self.x)
        self.kernel.run(x, self.gated, self.weight, tile=tile)
        assert torch.isnan(around[[0, -1]]).all()
        return x


def assert_projection(rows: int, d: int, width: int, dtype: torch.dtype, tile: Tile | None) -> None:
    case = Projection(rows, d, width, dtype)
    expected = projection_truth(case.x, case.weight, case.bias)
    plain = eager_projection(case.x, case.weight, case.bias)
    assert error(case.run(tile), expected) <= 1.2 * error(plain, expected)
    assert torch.isnan(case.around[[0, -1]]).all()
    assert same_bits(case.pool, case.expected_pool())


def assert_residual(rows: int, d: int, width: int, dtype: torch.dtype, tile: Tile | None) -> None:
    case = Residual(rows, width, d, dtype)
    expected = residual_truth(case.x, case.gated, case.weight)
    plain = torch.addmm(case.x, case.gated, case.weight)
    assert error(case.run(tile), expected) <= 1.2 * error(plain, expected)


CHECKS = pytest.mark.parametrize("check", [assert_projection, assert_residual], ids=["projection", "residual"])


@CHECKS
@every_tile
@both_types
@widths
def test_widths_types_and_tiles(
    d: int, width: int, dtype: torch.dtype, tile: Tile, check: Callable[[int, int, int, torch.dtype, Tile], None]
) -> None:
    for rows in (1, 130, 700):
        check(rows, d, width, dtype, tile)


@CHECKS
@every_tile
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: int, tile: Tile, check: Callable[[int, int, int, torch.dtype, Tile], None]) -> None:
    check(rows, 136, 96, torch.bfloat16, tile)


@CHECKS
def test_the_tile_of_choice_with_many_turns(check: Callable[[int, int, int, torch.dtype, None], None]) -> None:
    check(9001, 512, 512, torch.bfloat16, None)


@pytest.mark.parametrize(("d", "width"), [(512, 512), (72, 40)])
def test_bits_are_the_same_in_any_company_and_from_every_tile(d: int, width: int) -> None:
    rows = 700
    case, output = Projection(rows, d, width, torch.bfloat16), Residual(rows, width, d, torch.bfloat16)
    mixed, pool, x = case.run(TILES[0]).clone(), case.pool.clone(), output.run(TILES[0])
    for tile in TILES:
        case.mixed.fill_(NAN)
        case.pool.fill_(NAN)
        assert same_bits(case.run(tile), mixed)
        assert same_bits(case.pool, pool)
        assert same_bits(output.run(tile), x)
    none = torch.full((rows,), -1, dtype=torch.int32, device=device())
    for first, count in ((0, 1), (3, 65), (64, 200), (699, 1), (311, 389)):
        some = slice(first, first + count)
        alone, part = poisoned(count, 4 * width, dtype=torch.bfloat16), output.x[some].clone()
        torch.cuda.synchronize()
        case.kernel.run(case.x[some], case.weight, case.bias, none, alone, LAYER)
        output.kernel.run(part, output.gated[some], output.weight)
        assert same_bits(alone, mixed[some])
        assert same_bits(part, x[some])


def test_nothing_is_kept_without_a_pool_or_a_target() -> None:
    case = Projection(300, 64, 32, torch.bfloat16)
    with_pool = case.run().clone()
    case.pool.fill_(NAN)
    case.target.fill_(-1)
    torch.cuda.synchronize()
    assert same_bits(case.run(), with_pool)
    assert torch.isnan(case.pool).all()
    assert same_bits(projection.projection_silu(case.x, case.weight, case.bias), with_pool)


def test_pages_apart_and_far() -> None:
    """A pool whose pages lie apart, past 2^31 elements; what lies between stays as it was."""
    rows, d, width, stride = 65, 64, 32, 1 << 30
    memory = torch.zeros(3 * stride, dtype=torch.bfloat16, device=device())
    pool = memory.as_strided((3, 1, 2, PAGE, 1, width), (stride, 2 * PAGE * width, PAGE * width, width, width, 1))
    kernel = ProjectionKernel(d, width, torch.bfloat16, PAGE, 1, pool, device())
    x, weight = random(rows, d, dtype=torch.bfloat16), random(d, 4 * width, dtype=torch.bfloat16)
    bias, mixed = random(4 * width, dtype=torch.bfloat16), poisoned(rows, 4 * width, dtype=torch.bfloat16)
    target = torch.arange(2 * PAGE - 1, 2 * PAGE + rows - 1, dtype=torch.int32, device=device())
    torch.cuda.synchronize()
    kernel.run(x, weight, bias, target, mixed, 0)
    _, v, _, k = mixed.view(rows, 4, width).unbind(1)
    assert same_bits(pool[1, 0, :, -1, 0], torch.stack((k[0], v[0])))
    assert same_bits(pool[2, 0, :, :, 0], torch.stack((k[1:], v[1:])))
    assert int(torch.count_nonzero(memory)) == int(torch.count_nonzero(k)) + int(torch.count_nonzero(v))


def test_the_residual_function_leaves_its_input() -> None:
    case = Residual(100, 96, 64, torch.float16)
    before = case.x.clone()
    assert same_bits(residual.residual_product(case.x, case.gated, case.weight), case.run())
    assert torch.equal(case.x, before)


def test_captured_graphs_replay_over_new_contents_in_a_chain() -> None:
    """A product whose input the product before it made, in one graph, as in a stack of layers."""
    rows, d, width = 700, 128, 96
    case = Projection(rows, d, width, torch.bfloat16)
    output = ResidualKernel(width, d, torch.bfloat16, device())
    weight, gated = random(width, d, dtype=torch.bfloat16, scale=width**-0.5), random(rows, width, dtype=torch.bfloat16)
    x0 = random(rows, d, dtype=torch.bfloat16)

    def layers() -> None:
        case.x.copy_(x0)
        for _ in range(3):
            case.run()
            gated.copy_(case.mixed[:, :width])
            output.run(case.x, gated, weight)

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for _ in range(5):
        x0.copy_(random(rows, d, dtype=torch.bfloat16))
        torch.cuda.synchronize()
        layers()
        expected = case.x.clone(), case.mixed.clone()
        case.x.fill_(NAN)
        case.mixed.fill_(NAN)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(case.x, expected[0])
        assert same_bits(case.mixed, expected[1])


def test_what_does_not_fit_is_named() -> None:
    case, output = Projection(10, 64, 32, torch.bfloat16), Residual(10, 32, 64, torch.bfloat16)
    arguments = {"x": case.x, "weight": case.weight, "bias": case.bias, "target": case.target, "mixed": case.mixed}
    wrong = {
        "x": case.x[:, :56], "weight": case.weight.float(), "bias": case.bias[:-8], "target": case.target[:9],
        "mixed": case.mixed.cpu(),
    }  # fmt: skip
    for field, value in wrong.items():
        with pytest.raises(InvalidArgument) as caught:
            case.kernel.run(**(arguments | {field: value}), layer=LAYER)
        assert caught.value.field == field
    with pytest.raises(InvalidArgument) as caught:
        case.kernel.run(**arguments, layer=LAYERS)
    assert caught.value.field == "layer"
    with pytest.raises(InvalidArgument) as caught:
        case.kernel.run(**arguments, layer=LAYER, tile=Tile(32, 32))
    assert caught.value.field == "tile"
    with pytest.raises(InvalidArgument) as caught:
        output.kernel.run(output.x, output.gated[1:], output.weight)
    assert caught.value.field == "gated"
    for field, change in {"width": (64, 36), "depth": (68, 32)}.items():
        with pytest.raises(InvalidArgument) as caught:
            ProjectionKernel(*change, torch.bfloat16, PAGE, 1, None, device())
        assert caught.value.field == field
    with pytest.raises(InvalidArgument) as caught:
        ProjectionKernel(64, 32, torch.bfloat16, PAGE, LAYERS + 1, case.pool, device())
    assert caught.value.field == "pool"


def test_few_rows_take_small_tiles() -> None:
    assert tile_of(384, 2048, 512, 132).rows == 64
    assert tile_of(35840, 2048, 512, 132) == TILES[0]
