"""The matrix product with fused epilogues on Hopper (csrc/cuda/product.cu): what its two ops share."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.cuda.build import build
from mtserve.kernels.cuda.driver import Function, Module, tensor_map

DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 8  # of widths and strides, in elements: the copy engine wants 16 bytes
BOX = (64, 64)  # of a copy
THREADS = 384
MAPS = 4096  # cached tensor maps: one a weight, one a buffer and number of rows
PROJECTION, RESIDUAL = 0, 1  # EPILOGUE of product.cu


class Tile(NamedTuple):
    """What one thread block makes of the output at a time."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Cost:
    """Microseconds on an H200 (benchmarks/bench_product.py): of a launch, of a tile, and of 512 of its depth."""

    launch: float
    tile: float
    depth: float


COSTS = {Tile(128, 128): Cost(2.4, 1.4, 2.6), Tile(64, 128): Cost(1.45, 0.8, 1.65), Tile(64, 64): Cost(1.4, 0.5, 1.3)}
TILES = tuple(COSTS)


def tile_of(rows: int, columns: int, depth: int, sms: int) -> Tile:
    """The tile of least estimated time for an output [rows, columns]. Which it is changes no bit of the result."""

    def estimate(tile: Tile) -> float:
        rounds = math.ceil(math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns) / sms)
        cost = COSTS[tile]
        return cost.launch + rounds * (cost.tile + cost.depth * depth / 512)

    return min(TILES, key=estimate)


class Params(ctypes.Structure):
    """Mirrors `Params` of product.cu."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("bias", "target", "pages")],
        *[(name, ctypes.c_longlong) for name in ("page_stride", "layer_offset")],
        *[(name, ctypes.c_int) for name in ("width", "rows", "columns", "depth")],
    ]


class Product:
    """C [T, columns] = epilogue(A [T, depth] @ B [depth, columns]) for any T, with one epilogue.

    `fp8`: pages are of fp8, and a projection's k and v are rounded for them.
    Raises InvalidArgument for what the kernel cannot do, BuildFailed where it cannot be built.
    """

    def __init__(
        self, epilogue: int, depth: int, columns: int, dtype: torch.dtype, device: torch.device, *, fp8: bool = False
    ) -> None:
        require(dtype in DTYPES, "dtype", f"bfloat16 or float16, not {dtype}")
        require(depth > 0 and depth % ALIGNMENT == 0, "depth", f"a positive multiple of {ALIGNMENT}, not {depth}")
        require(
            columns > 0 and columns % ALIGNMENT == 0, "columns", f"a positive multiple of {ALIGNMENT}, not {columns}"
        )
        require(device.type == "cuda", "device", f"a CUDA device, not {device}")
        capability = torch.cuda.get_device_capability(device)
        require(capability == (9, 0), "device", f"compute capability 9.0 (Hopper), not {capability[0]}.{capability[1]}")
        self.depth, self.columns, self.dtype = depth, columns, dtype
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            # An allocation brings the context into being that modules are loaded into; it knows the device's index.
            self.device = torch.empty(1, device=device).device
            self._functions = {tile: _function(epilogue, dtype, tile, fp8, self.device.index) for tile in TILES}

    def check(self, name: str, matrix: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Raises InvalidArgument unless `matrix` has this shape, the kernel's type, and lies where it can be read."""
        fits = matrix.shape == shape and matrix.dtype == self.dtype and matrix.device == self.device
        if not fits or not matrix.is_contiguous() or matrix.data_ptr() % 16:
            expected = f"contiguous {list(shape)} of {self.dtype} on {self.device}, 16-byte aligned"
            got = f"{list(matrix.shape)} of {matrix.dtype} on {matrix.device}, strides {list(matrix.stride())}"
            raise InvalidArgument(f"expected {expected}, got {got}", field=name)

    def launch(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, params: Params, tile: Tile | None) -> None:
        """Launch on the current stream of this kernel's device, which must be the current one; operands are checked.

        Nothing is allocated, awaited or read from the device, so that a graph can capture it. `tile`: None lets
        `tile_of` choose.
        """
        rows = len(a)
        if tile is None:
            tile = tile_of(rows, self.columns, self.depth, self.sms)
        elif tile not in self._functions:
            raise InvalidArgument(f"no kernel for {tile}; there is {list(self._functions)}", field="tile")
        params.rows, params.columns, params.depth = rows, self.columns, self.depth
        tiles = math.ceil(rows / tile.rows) * math.ceil(self.columns / tile.columns)
        self._functions[tile].launch(min(tiles, self.sms), THREADS, _map(a), _map(b), _map(c), params)


def require(fits: bool, field: str, wanted: str) -> None:
    if not fits:
        raise InvalidArgument(f"the cuda product needs {wanted}", field=field)


def _map(matrix: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    return _cached_map(matrix.data_ptr(), matrix.dtype, *matrix.shape)


@lru_cache(MAPS)
def _cached_map(pointer: int, dtype: torch.dtype, rows: int, columns: int) -> ctypes.Array[ctypes.c_char]:
    return tensor_map(pointer, dtype, (rows, columns), BOX)


@lru_cache(64)
def _function(epilogue: int, dtype: torch.dtype, tile: Tile, fp8: bool, device: int) -> Function:
    """The kernel, loaded into the context of `device`, which is the current one."""
    macros = {
        "EPILOGUE": epilogue,
        "FP16": int(dtype == torch.float16),
        "FP8_PAGES": int(fp8),
        "TILE_ROWS": tile.rows,
        "TILE_COLUMNS": tile.columns,
    }
    module = Module(build("product", macros))
    return module.function("product", module.read_int("product_shared_bytes"))
