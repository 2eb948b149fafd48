"""HSTU attention on Hopper's matrix units (csrc/cuda/hstu_attention.cu): bf16 or fp16, pages of 64 tokens, fp8 too."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.attention.work import BLOCK, AttentionWork, build_work, sum_partial
from mtserve.kernels.cuda.build import build
from mtserve.kernels.cuda.driver import Function, Module, tensor_map
from mtserve.kernels.page_write.rounding import FP8
from mtserve.kernels.plan import KernelPlan

HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
PROJECTION_MAPS = 1024  # cached tensor maps: one a projection buffer, of which a graph bucket has few


class Params(ctypes.Structure):
    """Mirrors `Params` of hstu_attention.cu."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("uvqk", "work", "count", "slots", "table", "limit", "out", "counter")],
        ("split_stride", ctypes.c_longlong),
        *[(name, ctypes.c_int) for name in ("capacity", "heads", "table_width", "page_rows", "layer_row", "partial")],
        ("half_alpha", ctypes.c_float),
        ("inv_n", ctypes.c_float),
    ]


def tile_rows_of(head_dim: int) -> tuple[int, ...]:
    """The tiles that there are kernels for: one of 192 rows holds no more than 128 columns in registers."""
    return (128, 192) if head_dim <= 128 else (128,)


class AttentionKernel:
    """The attention of every layer of one model over one pool.

    `pool` [pages, layers, 2, 64, H, D] (None: nothing is ever cached), of `dtype` or fp8, may be a strided view whose
    pages and layers lie apart. Launches of one instance must follow each other on one stream: they share a counter of work.
    `deterministic`: for plans made so; a row's sum has the same bits however the plan cuts it.
    Raises InvalidArgument for what this kernel cannot do, BuildFailed where it cannot be built.
    """

    def __init__(
        self, heads: int, head_dim: int, dtype: torch.dtype, page_tokens: int, layers: int,
        pool: torch.Tensor | None, device: torch.device, *, deterministic: bool = False,
    ) -> None:  # fmt: skip
        _require(head_dim in HEAD_DIMS, "head_dim", f"one of {HEAD_DIMS}, not {head_dim}")
        _require(dtype in DTYPES, "dtype", f"bfloat16 or float16, not {dtype}")
        _require(page_tokens == BLOCK, "page_tokens", f"pages of {BLOCK} tokens, not {page_tokens}")
        _require(device.type == "cuda", "device", f"a CUDA device, not {device}")
        capability = torch.cuda.get_device_capability(device)
        _require(
            capability == (9, 0), "device", f"compute capability 9.0 (Hopper), not {capability[0]}.{capability[1]}"
        )
        self.heads, self.head_dim, self.dtype, self.layers = heads, head_dim, dtype, layers
        self.deterministic = deterministic
        fp8 = pool is not None and pool.dtype == FP8
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            # First, for it brings the context into being that modules are loaded into; it knows the device's index.
            self._counter = torch.zeros(2, dtype=torch.int32, device=device)
            self.device = self._counter.device
            self._functions = {
                rows: _function(head_dim, dtype, rows, deterministic, fp8, self.device.index)
                for rows in tile_rows_of(head_dim)
            }
            self._use_pool(pool)
        self._projection_map = lru_cache(PROJECTION_MAPS)(self._new_projection_map)

    def _use_pool(self, pool: torch.Tensor | None) -> None:
        self._pool = pool  # keeps the memory that the map points to
        self._page_rows = self._layer_rows = 0
        self._pool_map = None
        if pool is None:
            return
        expected = (self.layers, 2, BLOCK, self.heads, self.head_dim)
        width = self.heads * self.head_dim
        inner = (BLOCK * width, width, self.head_dim, 1)
        if pool.shape[1:] != expected or pool.dtype not in (self.dtype, FP8) or pool.device != self.device:
            wanted = f"[pages, *{list(expected)}] of {self.dtype} or {FP8} on {self.device}"
            got = f"{list(pool.shape)} of {pool.dtype} on {pool.device}"
            raise InvalidArgument(f"expected {wanted}, got {got}", field="pool")
        if pool.stride()[2:] != inner or any(stride % (2 * BLOCK * width) for stride in pool.stride()[:2]):
            raise InvalidArgument("K and V of one layer of a page must be contiguous", field="pool")
        if not len(pool):
            return
        self._page_rows, self._layer_rows = pool.stride(0) // width, pool.stride(1) // width
        rows = (len(pool) - 1) * self._page_rows + (self.layers - 1) * self._layer_rows + 2 * BLOCK
        # The copy engine's coordinates have 32 bits; they count rows, so that the bytes may be 2^31 times more.
        if rows >= 2**31:
            raise InvalidArgument(f"{rows} rows of keys and values; the limit is 2^31 - 1", field="pool")
        self._pool_map = tensor_map(pool.data_ptr(), pool.dtype, (rows, width), self._box(pool.dtype))

    def _box(self, dtype: torch.dtype) -> tuple[int, int]:
        """Of a copy: as many columns of a head as 128 bytes hold."""
        return (BLOCK, min(128 // dtype.itemsize, self.head_dim))

    def _new_projection_map(self, pointer: int, rows: int) -> ctypes.Array[ctypes.c_char]:
        return tensor_map(pointer, self.dtype, (rows, 4 * self.heads * self.head_dim), self._box(self.dtype))

    def run(self, uvqk: torch.Tensor, layer: int, work: AttentionWork, out: torch.Tensor, n: int) -> None:
        """Launch on the current stream of this kernel's device, which must be the current one.

        Nothing is allocated, awaited or read from the device, so that a graph can capture it.

        `uvqk` [T, 4, H, D] contiguous: u, v, q, k of the batch's rows. `out`: [T, H * D] of the model's dtype where
        the plan's max_splits is 1; else fp32 [S, T, H * D], S >= max_splits, of which row t gets the first
        `work.splits[t]`, to be summed in that order. Other rows of `out` stay as they are. A deterministic kernel
        always makes partial sums: a rounded sum is another than an unrounded one.
        """
        rows, width = len(uvqk), self.heads * self.head_dim
        partial = out.ndim == 3
        shape = (rows, 4, self.heads, self.head_dim)
        if uvqk.shape != shape or uvqk.dtype != self.dtype or not uvqk.is_contiguous():
            expected = f"contiguous {list(shape)} of {self.dtype}"
            raise InvalidArgument(f"expected {expected}, got {list(uvqk.shape)} of {uvqk.dtype}", field="uvqk")
        if (
            out.shape[-2:] != (rows, width)
            or out.dtype != (torch.float32 if partial else self.dtype)
            or not out.is_contiguous()
        ):
            raise InvalidArgument(f"expected {[rows, width]} of {self.dtype} or splits of it in float32, "
                                  f"got {list(out.shape)} of {out.dtype}", field="out")  # fmt: skip
        if self.deterministic and not partial:
            raise InvalidArgument("deterministic sums are partial sums: float32 [S, T, H * D]", field="out")
        if not 0 <= layer < self.layers:
            raise InvalidArgument(f"{layer} is not in 0..{self.layers - 1}", field="layer")
        if work.tile_rows not in self._functions:
            raise InvalidArgument(
                f"no kernel for {work.tile_rows}; there is {list(self._functions)}", field="tile_rows"
            )
        if n <= 0:
            raise InvalidArgument(f"{n} is not positive", field="n")
        if not rows or not len(work.work):
            return
        params = Params(
            uvqk.data_ptr(), work.work.data_ptr(), work.count.data_ptr(), work.slots.data_ptr(),
            work.page_table.data_ptr(), work.limit.data_ptr(), out.data_ptr(), self._counter.data_ptr(),
            rows * width, len(work.work), self.heads, work.page_table.shape[1], self._page_rows,
            layer * self._layer_rows, partial, 0.5 * self.head_dim**-0.5, 1.0 / n,
        )  # fmt: skip
        rows_map = self._projection_map(uvqk.data_ptr(), rows)
        threads = 128 * (work.tile_rows // BLOCK + 1)  # a warpgroup for each 64 rows, and the producer's
        # Without pages the pool's map is never looked through; it must be a valid one all the same.
        self._functions[work.tile_rows].launch(self.sms, threads, self._pool_map or rows_map, rows_map, params)


@lru_cache(256)
def _function(head_dim: int, dtype: torch.dtype, tile_rows: int, chunked: bool, fp8: bool, device: int) -> Function:
    """The kernel, loaded into the context of `device`, which is the current one."""
    macros = {
        "HEAD_DIM": head_dim, "FP16": int(dtype == torch.float16), "WARPGROUPS": tile_rows // BLOCK,
        "CHUNKED": int(chunked), "FP8_PAGES": int(fp8),
    }  # fmt: skip
    module = Module(build("hstu_attention", macros))
    return module.function("hstu_attention", module.read_int("hstu_shared_bytes"))


def _require(fits: bool, field: str, wanted: str) -> None:
    if not fits:
        raise InvalidArgument(f"the cuda attention needs {wanted}; use kernels='eager'", field=field)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor | None, plan: KernelPlan, n: int,
    *, deterministic: bool = False, pieces: int = 0, tile_rows: int = 0,
) -> torch.Tensor:  # fmt: skip
    """As `reference.attention`, the work planned on the fly: for tests and one-off use.

    `q`, `k`, `v` must be the sections of one projection's output [T, 4, H, D] (u, v, q, k). A NaN in pages of fp8 counts
    as 480 in bf16.
    """
    uvqk = _projection_of(q, k, v)
    rows, _, heads, head_dim = uvqk.shape
    pool = None if pages is None else pages.unsqueeze(1)
    kernel = AttentionKernel(heads, head_dim, q.dtype, plan.page_tokens, 1, pool, q.device, deterministic=deterministic)
    counts = np.diff(plan.row_offsets)
    slots = np.stack([plan.cached, plan.delta, plan.row_offsets[:-1], counts], axis=1).astype(np.int32)
    work, planned = build_work(
        slots, plan.limit.cpu().numpy(), plan.page_table, heads=heads, head_dim=head_dim, sms=kernel.sms, device=q.device,
        deterministic=deterministic, pieces=pieces, tile_rows=tile_rows,
    )  # fmt: skip
    width = heads * head_dim
    out = q.new_empty(rows, width)
    if planned.max_splits == 1 and not deterministic:
        kernel.run(uvqk, 0, work, out, n)
    else:
        partial = torch.full((planned.max_splits, rows, width), float("nan"), device=q.device)
        kernel.run(uvqk, 0, work, partial, n)
        out = sum_partial(partial, work.splits, halves=deterministic).to(q.dtype)
    return out.view(rows, heads, head_dim)


def _projection_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The tensor [T, 4, H, D] that `v`, `q`, `k` are sections 1, 2, 3 of."""
    if q.ndim == 3 and q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype:
        rows, heads, head_dim = q.shape
        width = heads * head_dim
        strides, start = (4 * width, head_dim, 1), q.storage_offset()
        same = len({each.untyped_storage().data_ptr() for each in (q, k, v)}) == 1
        offsets = (v.storage_offset(), k.storage_offset()) == (start - width, start + width)
        if same and offsets and start >= 2 * width and q.stride() == k.stride() == v.stride() == strides:
            return q.as_strided((rows, 4, heads, head_dim), (4 * width, width, head_dim, 1), start - 2 * width)
    raise InvalidArgument("q, k and v must be views of one tensor [T, 4, H, D] holding u, v, q, k", field="q")
