"""Projection, bias, SiLU and page write as one kernel on Hopper: bf16 or fp16, pages of 64 tokens, fp8 too."""

from __future__ import annotations

import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.page_write.rounding import FP8
from mtserve.kernels.product.cuda import ALIGNMENT, PROJECTION, Params, Product, Tile, require

PAGE_TOKENS = 64


class ProjectionKernel:
    """The projections of every layer of one model: [T, d] to u, v, q, k of `width` = H * D columns each.

    `pool` [pages, layers, 2, 64, H, D] (None: nothing is kept) may be a strided view whose pages and layers lie
    apart. It has the model's type or fp8: k and v are then rounded for it, wherever they go.
    Raises InvalidArgument for what the kernel cannot do, BuildFailed where it cannot be built.
    """

    def __init__(
        self, d: int, width: int, dtype: torch.dtype, page_tokens: int, layers: int, pool: torch.Tensor | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        require(page_tokens == PAGE_TOKENS, "page_tokens", f"pages of {PAGE_TOKENS} tokens, not {page_tokens}")
        require(width > 0 and width % ALIGNMENT == 0, "width", f"a positive multiple of {ALIGNMENT}, not {width}")
        fp8 = pool is not None and pool.dtype == FP8
        self._product = Product(PROJECTION, d, 4 * width, dtype, device, fp8=fp8)
        self.width, self.layers = width, layers
        if pool is not None:
            self._check_pool(pool)
        self._pool = pool if pool is not None and len(pool) else None

    def _check_pool(self, pool: torch.Tensor) -> None:
        dtype, device = self._product.dtype, self._product.device
        shape = pool.shape
        fits = pool.ndim == 6 and shape[1:4] == (self.layers, 2, PAGE_TOKENS) and shape[4] * shape[5] == self.width
        if not fits or pool.dtype not in (dtype, FP8) or pool.device != device:
            sizes = f"[pages, {self.layers}, 2, {PAGE_TOKENS}, H, D]"
            expected = f"{sizes} of {dtype} or {FP8} on {device} with H * D {self.width}"
            raise InvalidArgument(f"expected {expected}, got {list(shape)} of {pool.dtype} on {pool.device}",
                                  field="pool")  # fmt: skip
        inner = (PAGE_TOKENS * self.width, self.width, shape[5], 1)
        apart = [*pool.stride()[:2], pool.data_ptr() // pool.element_size()]
        if pool.stride()[2:] != inner or any(stride % ALIGNMENT for stride in apart):
            wanted = f"K and V of one layer of a page must be contiguous and start at multiples of {ALIGNMENT} values"
            raise InvalidArgument(wanted, field="pool")

    def run(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, mixed: torch.Tensor,
        layer: int, *, tile: Tile | None = None,
    ) -> None:  # fmt: skip
        """mixed [T, 4 width] = SiLU(x weight + bias), and its k and v of rows with a target go into `layer`'s pages.

        x [T, d], weight [d, 4 width], bias [4 width], all contiguous and of the model's dtype. `target` int32
        [at least T]: page * 64 + offset, -1 for rows that are not kept; a page must be one of the pool's.
        Weight, bias and targets are read while the kernels before this one still run: none of those may write them.
        Launches on the current stream of this kernel's device, which must be the current one; nothing is allocated,
        awaited or read from the device, so that a graph can capture it. `tile` forces one of `product.cuda.TILES`.
        """
        product, rows, columns = self._product, len(x), 4 * self.width
        product.check("x", x, (rows, product.depth))
        product.check("weight", weight, (product.depth, columns))
        product.check("bias", bias, (columns,))
        product.check("mixed", mixed, (rows, columns))
        fits = target.ndim == 1 and len(target) >= rows and target.is_contiguous()
        if not fits or target.dtype != torch.int32 or target.device != product.device:
            expected = f"at least {rows} contiguous of torch.int32 on {product.device}"
            got = f"{list(target.shape)} of {target.dtype} on {target.device}"
            raise InvalidArgument(f"expected {expected}, got {got}", field="target")
        if not 0 <= layer < self.layers:
            raise InvalidArgument(f"{layer} is not in 0..{self.layers - 1}", field="layer")
        if not rows:
            return
        params = Params(bias=bias.data_ptr(), target=target.data_ptr(), width=self.width)
        if self._pool is not None:
            params.pages = self._pool.data_ptr()
            params.page_stride = self._pool.stride(0)
            params.layer_offset = layer * self._pool.stride(1)
        product.launch(x, weight, mixed, params, tile)


def projection_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[T, w] of rows x [T, d]; weight [d, w]; bias [w], w a multiple of 32: for tests and one-off use."""
    columns = weight.shape[1]
    require(columns % (4 * ALIGNMENT) == 0, "weight", f"columns in a multiple of {4 * ALIGNMENT}, not {columns}")
    kernel = ProjectionKernel(len(weight), columns // 4, x.dtype, PAGE_TOKENS, 1, None, x.device)
    target = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
    mixed = x.new_empty(len(x), columns)
    torch.cuda.current_stream(x.device).synchronize()  # the targets are read early
    kernel.run(x, weight, bias, target, mixed, 0)
    return mixed
