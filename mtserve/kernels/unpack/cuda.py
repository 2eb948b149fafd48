"""K and V from packed pages by one kernel on Hopper (csrc/cuda/rebuild.cu, unpack.cu): bf16 or fp16, 64 tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.cuda.build import build
from mtserve.kernels.cuda.driver import Function, Module, tensor_map
from mtserve.kernels.cuda.queue import PageKernel
from mtserve.kernels.host_format.shape import ALIGNMENT, FormatShape
from mtserve.kernels.unpack.reference import FORMATS

DTYPES = (torch.bfloat16, torch.float16)
PAGE_TOKENS = 64
VECTOR = 8  # elements of 16 bytes
BOX = (64, 64)  # of a copy of B
TILE_PAGES, TILE_COLUMNS = 2, 128
MOST_PAGES = 896  # of a launch, as in unpack.cuh
REBUILD_THREADS, UNPACK_THREADS = 384, 256


class Params(ctypes.Structure):
    """Mirrors `Params` of unpack.cuh."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("packed", "pool", "bias")],
        *[(name, ctypes.c_longlong) for name in ("page_bytes", "page_stride", "layer_stride")],
        *[(name, ctypes.c_int) for name in ("layer_bytes", "peaks_offset", "width", "head_dim", "depth")],
        *[(name, ctypes.c_int) for name in ("first", "last", "count")],
        ("pages", ctypes.c_int * MOST_PAGES),
    ]


class UnpackKernel:
    """Makes K and V in `pool` [pages, layers, 2, 64, H, D] from `packed` uint8 [pages, shape.bytes], page by page.

    Formats "x8" and "x4" multiply by `weights`, of each layer [d, 4 * H * D], and add `biases`, of each [4 * H * D],
    columns u, v, q, k: those of v and k are copied here, layers * (d rounded up to 64) * 2 * H * D elements. "kv8"
    reads none of either. `pool` may be a strided view whose pages and layers lie apart.
    Raises InvalidArgument for what the kernels cannot do, BuildFailed where they cannot be built.
    """

    def __init__(
        self, shape: FormatShape, packed: torch.Tensor, pool: torch.Tensor, weights: Sequence[torch.Tensor] = (),
        biases: Sequence[torch.Tensor] = (),
    ) -> None:  # fmt: skip
        _check_shape(shape)
        _check_memory(shape, packed, pool)
        self._multiplies = shape.format != "kv8"
        self._layers, self._width = shape.layers, shape.heads * shape.head_dim
        self._pages = len(pool)
        self._memory: tuple[torch.Tensor, ...] = (packed, pool)  # what the kernel holds the addresses of
        self._params = Params(
            packed=packed.data_ptr(), pool=pool.data_ptr(), page_bytes=shape.bytes, page_stride=pool.stride(0),
            layer_stride=pool.stride(1), layer_bytes=shape.layer_bytes, peaks_offset=shape.peaks_offset,
            width=self._width, head_dim=shape.head_dim, depth=shape.d,
        )  # fmt: skip
        self._to = ctypes.addressof(self._params) + Params.pages.offset
        with torch.cuda.device(pool.device):
            if self._multiplies:
                self._take_weights(shape, weights, biases, pool)
            sms = torch.cuda.get_device_properties(pool.device).multi_processor_count
            function = _function(shape, pool.device.index)
        if self._multiplies:
            self._tile_pages, self._column_tiles = TILE_PAGES, -(-2 * self._width // TILE_COLUMNS)
            self._most_blocks = sms
            self._prepared = function.prepare(REBUILD_THREADS, self._map, self._params)
        else:  # a block for each page and side
            self._tile_pages, self._column_tiles, self._most_blocks = 1, 2, 0
            self._prepared = function.prepare(UNPACK_THREADS, self._params)

    def _take_weights(
        self, shape: FormatShape, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], pool: torch.Tensor
    ) -> None:
        columns = 4 * self._width
        for name, given, expected in (("weights", weights, (shape.d, columns)), ("biases", biases, (columns,))):
            _require(len(given) == shape.layers, name, f"one for each of {shape.layers} layers, not {len(given)}")
            for each in given:
                fits = each.shape == expected and each.dtype == pool.dtype and each.device == pool.device
                got = f"{list(each.shape)} of {each.dtype} on {each.device}"
                _require(fits, name, f"{list(expected)} of {pool.dtype} on {pool.device}, not {got}")
        depth = -(-shape.d // BOX[0]) * BOX[0]
        stacked = pool.new_zeros(shape.layers, depth, 2 * self._width)
        bias = pool.new_empty(shape.layers, 2 * self._width)
        for layer, (weight, offset) in enumerate(zip(weights, biases, strict=True)):
            stacked[layer, : shape.d] = _v_and_k(weight)
            bias[layer] = _v_and_k(offset)
        torch.cuda.current_stream().synchronize()  # the kernel may run on any stream
        self._memory += (stacked, bias)
        self._params.bias = bias.data_ptr()
        self._map = tensor_map(stacked.data_ptr(), pool.dtype, (shape.layers * depth, 2 * self._width), BOX)

    def for_queues(self) -> PageKernel:
        """For a queue's thread to launch. The memory that it reads must stay as long as the queue may."""
        fields = [getattr(Params, name).offset for name in ("first", "last", "count", "pages")]
        launch = self._prepared
        return PageKernel(
            launch.function, launch.threads, launch.shared_bytes, launch.values(), paged=int(self._multiplies),
            fields=fields, most_pages=MOST_PAGES, tile_pages=self._tile_pages, column_tiles=self._column_tiles,
            most_blocks=self._most_blocks,
        )  # fmt: skip

    def run(self, pages: npt.NDArray[np.int32], first: int, last: int, stream: int) -> None:
        """Queue on the stream with handle `stream`: K and V of layers [first, last) of `pages`, int32 [n] on the CPU.

        All 64 tokens of a page are made. One launch for up to MOST_PAGES pages. The device of the pool is the current
        one; nothing is allocated there, awaited or read from it, and `pages` may change once this returns.
        Raises InvalidArgument for ids that the pool does not have and for layers that there are not.
        """
        if pages.dtype != np.int32 or pages.ndim != 1 or not pages.flags.c_contiguous:
            raise InvalidArgument(
                f"expected contiguous int32 [n], got {pages.dtype} {list(pages.shape)}", field="pages"
            )
        if not 0 <= first <= last <= self._layers:
            raise InvalidArgument(f"[{first}, {last}) is not within 0..{self._layers}", field="layers")
        if first == last or not len(pages):
            return
        # As unsigned numbers those below zero are the largest.
        if int(pages.view(np.uint32).max()) >= self._pages:
            raise InvalidArgument(f"{pages.min()} to {pages.max()} is not within 0..{self._pages - 1}", field="pages")
        self._params.first, self._params.last = first, last
        address = pages.ctypes.data
        for start in range(0, len(pages), MOST_PAGES):
            self._launch(address + 4 * start, min(MOST_PAGES, len(pages) - start), last - first, stream)

    def _launch(self, pages: int, count: int, layers: int, stream: int) -> None:
        """Of `count` ids at the address `pages`."""
        ctypes.memmove(self._to, pages, 4 * count)
        self._params.count = count
        tiles = layers * -(-count // self._tile_pages) * self._column_tiles
        self._prepared.run(min(tiles, self._most_blocks or tiles), stream)


def _v_and_k(columns: torch.Tensor) -> torch.Tensor:
    """[..., 2 w] of [..., 4 w]: u, v, q, k."""
    _, v, _, k = columns.detach().chunk(4, -1)
    return torch.cat((v, k), -1)


def _require(fits: bool, field: str, wanted: str) -> None:
    if not fits:
        raise InvalidArgument(f"the cuda unpack needs {wanted}", field=field)


def _check_shape(shape: FormatShape) -> None:
    _require(shape.format in FORMATS, "format", f"one of {', '.join(FORMATS)}, not {shape.format!r}")
    _require(shape.dtype in DTYPES, "dtype", f"bfloat16 or float16, not {shape.dtype}")
    _require(shape.page_tokens == PAGE_TOKENS, "page_tokens", f"pages of {PAGE_TOKENS} tokens, not {shape.page_tokens}")
    if shape.format == "kv8":
        _require(shape.head_dim % VECTOR == 0, "head_dim", f"a multiple of {VECTOR}, not {shape.head_dim}")
        return
    width = shape.heads * shape.head_dim
    _require(width % VECTOR == 0, "width", f"H * D in a multiple of {VECTOR}, not {width}")
    _require(shape.d % VECTOR == 0, "d", f"a multiple of {VECTOR}, not {shape.d}")


def _check_memory(shape: FormatShape, packed: torch.Tensor, pool: torch.Tensor) -> None:
    inner = (shape.layers, 2, PAGE_TOKENS, shape.heads, shape.head_dim)
    fits = pool.ndim == 6 and pool.shape[1:] == inner and pool.dtype == shape.dtype
    got = f"{list(pool.shape)} of {pool.dtype}"
    _require(fits, "pool", f"[pages, {', '.join(map(str, inner))}] of {shape.dtype}, not {got}")
    _require(pool.device.type == "cuda", "device", f"a CUDA device, not {pool.device}")
    capability = torch.cuda.get_device_capability(pool.device)
    _require(capability == (9, 0), "device", f"compute capability 9.0 (Hopper), not {capability[0]}.{capability[1]}")
    width = shape.heads * shape.head_dim
    side_by_side = pool.stride()[2:] == (PAGE_TOKENS * width, width, shape.head_dim, 1)
    apart = [*pool.stride()[:2], pool.data_ptr() // pool.element_size()]
    aligned = side_by_side and not any(stride % VECTOR for stride in apart)
    _require(aligned, "pool", "K and V of one layer of a page contiguous and 16-byte aligned")
    expected = (len(pool), shape.bytes)
    fits = packed.shape == expected and packed.dtype == torch.uint8 and packed.device == pool.device
    got = f"{list(packed.shape)} of {packed.dtype} on {packed.device}"
    _require(fits, "packed", f"{list(expected)} of torch.uint8 on {pool.device}, not {got}")
    fits = packed.is_contiguous() and packed.data_ptr() % ALIGNMENT == 0
    _require(fits, "packed", f"contiguous memory, {ALIGNMENT}-byte aligned")


def _function(shape: FormatShape, device: int) -> Function:
    """The kernel for `shape`, loaded into the context of `device`, which is the current one."""
    fp16 = int(shape.dtype == torch.float16)
    if shape.format == "kv8":
        return _unpack(fp16, device)
    return _rebuild(shape.bits, 16 if shape.row_bytes % 16 == 0 else 8, fp16, device)


@lru_cache(64)
def _unpack(fp16: int, device: int) -> Function:
    """Of unpack.cu, one a device."""
    return Module(build("unpack", {"FP16": fp16})).function("unpack_codes", 0)


@lru_cache(64)
def _rebuild(bits: int, load_bytes: int, fp16: int, device: int) -> Function:
    """Of rebuild.cu, one a device."""
    module = Module(build("rebuild", {"BITS": bits, "LOAD_BYTES": load_bytes, "FP16": fp16}))
    return module.function("rebuild", module.read_int("rebuild_shared_bytes"))
