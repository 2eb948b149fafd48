"""The one buffer of a batch's metadata: nothing overlaps, what a batch leaves empty says so, turns alternate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import SCHEMA

from mtserve.engine.forward.batch import BatchPlan, BatchSize
from mtserve.engine.forward.metadata import SMALLEST_BUCKET, Capacity, Metadata, bucket_rows

ROW_ORDER, TOKEN_ORDER = ("limit", "group", "target"), ("row", "source", "position", "bucket")
WORK = {"heads": 2, "head_dim": 64, "sms": 4, "deterministic": False}


def _metadata(slots: int) -> Metadata:
    return Metadata(Capacity.of(SCHEMA, 2000, slots, 4), torch.device("cpu"))


def _lay_out(rng: np.random.Generator, slots: int, metadata: Metadata) -> tuple[int, BatchPlan]:
    """A batch of random lengths and contents in `metadata`'s room, and its bucket."""
    cached, delta, candidates = (rng.integers(low, 90, slots) for low in (0, 1, 1))
    rows = delta + candidates
    first, total = np.cumsum(rows) - rows, int(rows.sum())
    limits = [
        np.concatenate((c + 1 + np.arange(d), np.full(n, c + d)))
        for c, d, n in zip(cached, delta, candidates, strict=True)
    ]
    bucket, raw_bytes = bucket_rows(total), 8 * int(rng.integers(1, 2 * total))
    arrays = metadata.room(bucket)
    arrays.slots[:slots] = np.stack((cached, delta, first, rows), axis=1)
    arrays.page_table[:slots, :3] = rng.integers(0, 50, (slots, 3))
    arrays.limit[:total], arrays.limit[total:] = np.concatenate(limits), 0
    for name in ("group", "target", *TOKEN_ORDER):
        getattr(arrays, name)[:] = rng.integers(-1, 999, bucket)
    arrays.tiles[:] = rng.integers(-1, 999, arrays.tiles.shape)
    arrays.raw[:raw_bytes] = rng.integers(0, 256, raw_bytes)
    tokens = int(delta.sum())
    size = BatchSize(total, slots, 3, raw_bytes, len(arrays.tiles))
    return bucket, BatchPlan(arrays, size, 64, len(arrays.tiles), (0, 0, 0, tokens, total), ())


def test_buckets_hold_their_rows_with_little_to_spare() -> None:
    last = 0
    for rows in range(1, 40_000, 7):
        bucket = bucket_rows(rows)
        assert bucket >= max(rows, last)
        assert bucket - rows < SMALLEST_BUCKET or bucket <= rows * 1.125
        assert bucket_rows(bucket) == bucket
        last = bucket


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_a_batch_arrives_whole(slots: int) -> None:
    rng = np.random.default_rng(slots)
    metadata = _metadata(5)
    for _ in range(4):
        bucket, plan = _lay_out(rng, slots, metadata)
        work = metadata.plan_attention(bucket, plan, **WORK)
        device, pinned, size = metadata.to_copy(bucket, plan.raw_bytes)
        device.view(torch.uint8)[:size] = pinned.view(torch.uint8)[:size]
        for name in (*ROW_ORDER, *TOKEN_ORDER, "tiles"):
            assert np.array_equal(metadata.on_device(bucket, name).numpy(), getattr(plan.arrays, name)), name
        raw = metadata.on_device(bucket, "raw").view(torch.uint8).numpy()
        assert np.array_equal(raw[: plan.raw_bytes], plan.arrays.raw[: plan.raw_bytes])
        assert np.array_equal(metadata.on_device(bucket, "slots").numpy()[:slots], plan.arrays.slots[:slots])
        table = metadata.on_device(bucket, "page_table").numpy()[:slots, :3]
        assert np.array_equal(table, plan.arrays.page_table[:slots, :3])
        splits = metadata.on_device(bucket, "splits").numpy()
        assert (splits[: plan.rows] >= 1).all() and (splits[plan.rows :] == 0).all()
        counts = metadata.on_device(bucket, "counts").tolist()
        assert counts == [work.items, plan.slots, plan.first_candidate, plan.candidates]
        assert metadata.work(bucket, work.tile_rows).count.item() == work.items > 0


def test_every_batch_within_the_capacity_has_room_for_its_feature_rows() -> None:
    capacity = Capacity.of(SCHEMA, 2000, 5, 4)
    metadata = Metadata(capacity, torch.device("cpu"))
    for rows in (1, 64, 65, 700, 2000):
        room = metadata.room(bucket_rows(rows))
        most = 5 * SCHEMA.user_dtype.itemsize + rows * max(
            SCHEMA.behaviour_dtype.itemsize, SCHEMA.candidate_dtype.itemsize
        )
        assert len(room.raw) >= most + 3 * 15  # a section may begin up to 15 bytes on


def test_a_turn_leaves_the_buffer_of_the_batch_under_way_alone() -> None:
    rng = np.random.default_rng(0)
    metadata = _metadata(4)
    bucket, first = _lay_out(rng, 3, metadata)
    metadata.plan_attention(bucket, first, **WORK)
    under_way = [array.copy() for array in first.arrays]
    other, second = _lay_out(rng, 4, metadata)
    metadata.plan_attention(other, second, **WORK)
    metadata.plan_attention(other, second, **WORK, pieces=1)
    for kept, array in zip(under_way, first.arrays, strict=True):
        assert np.array_equal(kept, array)
    assert metadata.room(bucket).limit.ctypes.data == first.arrays.limit.ctypes.data


def test_nothing_has_no_row_to_make_to_see_to_write_or_to_score() -> None:
    rng, metadata = np.random.default_rng(0), _metadata(5)
    for bucket in (64, 512, 1152):
        used, plan = _lay_out(rng, 3, metadata)  # whatever was there before
        metadata.plan_attention(used, plan, **WORK)
        device, pinned, size = metadata.nothing(bucket)
        device.view(torch.uint8)[:size] = pinned.view(torch.uint8)[:size]
        assert (metadata.on_device(bucket, "target") == -1).all()
        assert (metadata.on_device(bucket, "tiles")[:, 0] == -1).all()
        for name in ("counts", "slots", "page_table", "limit", "group", "splits", "work"):
            assert not metadata.on_device(bucket, name).any(), name
