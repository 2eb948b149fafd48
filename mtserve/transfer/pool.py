"""The bytes of both tiers: pages of K and V on the device, and their twins in host memory.

A page holds all layers of `page_tokens` tokens side by side, so that a page is one contiguous
piece for the copy engine (1 MiB for 64 tokens of 8 layers x 4 heads x 128 in bf16).
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


def allocate_arena(shape: PageShape, pages: int, *, pinned: bool, poison: bool) -> torch.Tensor:
    """The host arena [pages, *shape.sizes], pinned for CUDA. Raises ResourceExhausted naming the limit."""
    try:
        arena = torch.empty((pages, *shape.sizes), dtype=shape.dtype, pin_memory=pinned and pages > 0)
    except RuntimeError as error:
        size = format_bytes(pages * shape.bytes)
        kind = "pinned host memory (see `ulimit -l`)" if pinned else "host memory"
        raise ResourceExhausted(f"{size} of {kind} could not be had: {error}", field="host_cache") from None
    if poison:
        arena.fill_(float("nan"))
    return arena
