"""The shape of a page, on the device and in host memory alike, and the device's pool of them.

Sizes were chosen by trials on an H200, with the link's 55 GB/s as the goal; benchmarks/bench_transfer.py repeats those
of whole pages:

    page    64 tokens of all layers side by side: 1 MiB for 8 layers x 4 heads x 128 in bf16. The copy engine moves
            whole pages that lie anywhere at 54 GB/s; by layer, 128 KiB, it would be 40.
    run     up to 16 neighbouring pages of one user, on both sides (csrc/cache/allocator.h): 2 layers of such a run,
            a strided piece of 4 MiB, move at 53 GB/s, so that a long history can come by groups of layers.
    chunk   64 MiB of the arena, pinned at once (transfer/arena.py): other calls of CUDA wait 2.5 ms for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtserve.errors import ResourceExhausted
from mtserve.units import format_bytes


@dataclass(frozen=True)
class PageShape:
    """Geometry of one page: [layers, 2 (K, V), page_tokens, heads, head_dim] of `dtype`."""

    layers: int
    page_tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.page_tokens, self.heads, self.head_dim)

    @property
    def bytes(self) -> int:
        layers, sides, tokens, heads, head_dim = self.sizes
        return layers * sides * tokens * heads * head_dim * self.dtype.itemsize


def allocate_pool(shape: PageShape, pages: int, device: torch.device, *, poison: bool) -> torch.Tensor:
    """The device pool [pages, *shape.sizes]. Raises ResourceExhausted naming the size that did not fit.

    `poison` fills it with NaN: whatever reads a page before it was written shows at once.
    """
    try:
        pool = torch.empty((pages, *shape.sizes), dtype=shape.dtype, device=device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        size = format_bytes(pages * shape.bytes)
        raise ResourceExhausted(f"{size} on {device} did not fit: {error}", field="gpu_cache") from None
    if poison:
        pool.fill_(float("nan"))
    return pool
