"""The one buffer of a batch's metadata: nothing overlaps, what a batch leaves empty says so, turns alternate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtserve.engine.metadata import SMALLEST_BUCKET, Metadata, bucket_rows
from mtserve.kernels.plan import HostPlan

NAMES = ("limit", "group", "target", "splits")
SHAPE = {"heads": 2, "head_dim": 64, "sms": 4}


def _plan(rng: np.random.Generator, slots: int) -> HostPlan:
    cached, delta, candidates = (rng.integers(low, 90, slots) for low in (0, 1, 1))
    rows = delta + candidates
    first = np.cumsum(rows) - rows
    limits = [
        np.concatenate((c + 1 + np.arange(d), np.full(n, c + d)))
        for c, d, n in zip(cached, delta, candidates, strict=True)
    ]
    total = int(rows.sum())
    return HostPlan(
        page_tokens=64,
        slots=np.stack((cached, delta, first, rows), axis=1).astype(np.int32),
        page_table=rng.integers(0, 50, (slots, 3)).astype(np.int32),
        limit=np.concatenate(limits).astype(np.int32),
        group=rng.integers(0, 4, total).astype(np.int32),
        target=rng.integers(-1, 999, total).astype(np.int32),
        candidate_rows=np.arange(total),
    )


def test_buckets_hold_their_rows_with_little_to_spare() -> None:
    last = 0
    for rows in range(1, 40_000, 7):
        bucket = bucket_rows(rows)
        assert bucket >= max(rows, last)
        assert bucket - rows < SMALLEST_BUCKET or bucket <= rows * 1.125
        assert bucket_rows(bucket) == bucket
        last = bucket


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_a_batch_arrives_whole_and_the_rest_says_nothing(slots: int) -> None:
    rng = np.random.default_rng(slots)
    metadata = Metadata(2048, 5, 4, torch.device("cpu"))
    for _ in range(4):
        plan = _plan(rng, slots)
        bucket = bucket_rows(plan.rows)
        metadata.turn()
        work = metadata.fill(plan, bucket, **SHAPE)
        metadata.upload(bucket)
        arrived = {name: metadata.on_device(bucket, name).numpy() for name in (*NAMES, "slots", "page_table", "work")}
        for name in ("limit", "group", "target"):
            assert np.array_equal(arrived[name][: plan.rows], getattr(plan, name))
        assert (arrived["limit"][plan.rows :] == 0).all() and (arrived["target"][plan.rows :] == -1).all()
        assert (arrived["splits"][: plan.rows] >= 1).all() and (arrived["splits"][plan.rows :] == 0).all()
        assert np.array_equal(arrived["slots"][:slots], plan.slots)
        assert np.array_equal(arrived["page_table"][:slots, :3], plan.page_table)
        assert metadata.work(bucket, work.tile_rows).count.item() == work.items > 0


def test_a_turn_leaves_the_buffer_of_the_batch_under_way_alone() -> None:
    rng = np.random.default_rng(0)
    metadata = Metadata(2048, 4, 4, torch.device("cpu"))
    first, second = _plan(rng, 3), _plan(rng, 4)
    metadata.turn()
    metadata.fill(first, bucket_rows(first.rows), **SHAPE)
    under_way = metadata._pinned[0]
    kept = under_way.clone()
    metadata.turn()
    metadata.fill(second, bucket_rows(second.rows), **SHAPE)
    metadata.fill(second, bucket_rows(second.rows), **SHAPE, pieces=1)
    assert torch.equal(under_way, kept)
    metadata.turn()
    assert metadata._pinned[0] is under_way
