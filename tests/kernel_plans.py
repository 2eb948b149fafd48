"""Random jagged batches for kernels: every page that no token lives in, and every tail behind one, holds NaN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from mtserve.kernels.plan import KernelPlan


@dataclass(frozen=True)
class Shape:
    """One user slot: tokens cached, tokens new, candidates."""

    cached: int
    delta: int
    candidates: int


@dataclass(frozen=True)
class Batch:
    """A plan with its inputs; q, k, v, u and y are [T, heads, head_dim], pages [pages, 2, page_tokens, heads, head_dim]."""

    plan: KernelPlan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pages: torch.Tensor


SHAPES = st.lists(
    st.builds(Shape, st.integers(0, 23), st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=5
).filter(lambda shapes: sum(each.delta + each.candidates for each in shapes) > 0)
MASKS = st.sampled_from(["causal", "full", "random"])


def make_batch(
    shapes: list[Shape], *, mask: str, page_tokens: int, heads: int, head_dim: int, seed: int,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Batch:  # fmt: skip
    """`mask`: how prefix rows see: causal, all of the prefix, or a random limit; candidates always get a random one."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    offsets = np.cumsum([0] + [each.delta + each.candidates for each in shapes])
    counts = [-(-(each.cached + each.delta) // page_tokens) for each in shapes]
    spare = 3  # pages that nobody owns
    ids = rng.permutation(sum(counts) + spare)
    table = np.full((len(shapes), max(1, *counts)), -1, dtype=np.int64)
    pages = torch.full((len(ids), 2, page_tokens, heads, head_dim), float("nan"))
    limits: list[int] = []
    writes: list[tuple[int, int, int]] = []
    for slot, each in enumerate(shapes):
        table[slot, : counts[slot]] = ids[sum(counts[:slot]) : sum(counts[: slot + 1])]
        for token in range(each.cached):
            page = table[slot, token // page_tokens]
            pages[page, :, token % page_tokens] = torch.randn(2, heads, head_dim, generator=generator)
        prefix = each.cached + each.delta
        for token in range(each.cached, prefix):
            limits.append({"causal": token + 1, "full": prefix}.get(mask, int(rng.integers(1, prefix + 1))))
            row = int(offsets[slot]) + token - each.cached
            writes.append((row, int(table[slot, token // page_tokens]), token % page_tokens))
        limits.extend(int(limit) for limit in rng.integers(0, prefix + 1, each.candidates))
    kept = [write for write in writes if rng.random() < 0.8]  # some tokens find no page
    write = torch.tensor(kept, dtype=torch.int64).reshape(-1, 3)
    candidate_rows = [
        row for slot, each in enumerate(shapes) for row in range(offsets[slot] + each.delta, offsets[slot + 1])
    ]
    rows = int(offsets[-1])
    plan = KernelPlan(
        row_offsets=tuple(int(offset) for offset in offsets),
        cached=tuple(each.cached for each in shapes),
        delta=tuple(each.delta for each in shapes),
        page_tokens=page_tokens,
        page_table=torch.from_numpy(table).to(device),
        limit=torch.tensor(limits, dtype=torch.int32, device=device),
        group=torch.from_numpy(rng.integers(0, 4, rows)).to(device),
        write_rows=write[:, 0].contiguous().to(device),
        write_pages=write[:, 1].contiguous().to(device),
        write_offsets=write[:, 2].contiguous().to(device),
        candidate_rows=torch.tensor(candidate_rows, dtype=torch.int64, device=device),
    )
    q, k, v = torch.randn(3, rows, heads, head_dim, generator=generator).to(device, dtype)
    return Batch(plan, q, k, v, pages.to(device, dtype))
