"""Output product and residual as one kernel on Hopper: bf16 or fp16."""

from __future__ import annotations

import torch

from mtserve.kernels.product.cuda import RESIDUAL, Params, Product, Tile


class ResidualKernel:
    """The output products of every layer of one model: `width` columns to `d`.

    Raises InvalidArgument for what the kernel cannot do, BuildFailed where it cannot be built.
    """

    def __init__(self, width: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        self._product = Product(RESIDUAL, width, d, dtype, device)

    def run(self, x: torch.Tensor, gated: torch.Tensor, weight: torch.Tensor, *, tile: Tile | None = None) -> None:
        """x [T, d] += gated [T, width] @ weight [width, d] in place, summed in fp32 and rounded once.

        All contiguous and of the model's dtype. The weight is read while the kernels before this one still run: none of
        those may write it. Launches on the current stream of this kernel's device, which must
        be the current one; nothing is allocated, awaited or read from the device, so that a graph can capture it.
        `tile` forces one of `product.cuda.TILES`.
        """
        product, rows = self._product, len(x)
        product.check("x", x, (rows, product.columns))
        product.check("gated", gated, (rows, product.depth))
        product.check("weight", weight, (product.depth, product.columns))
        if rows:
            product.launch(gated, weight, x, Params(), tile)


def residual_product(x: torch.Tensor, gated: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, d] of x [T, d], gated [T, w] and weight [w, d], x left as it is: for tests and one-off use."""
    out = x.clone()
    width, d = weight.shape
    torch.cuda.current_stream(x.device).synchronize()  # the weight is read early
    ResidualKernel(width, d, x.dtype, x.device).run(out, gated, weight)
    return out
