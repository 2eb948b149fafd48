"""The page allocator against a plain set."""

from __future__ import annotations

import random

import pytest

from mtserve._core import PageAllocator
from mtserve.errors import CorruptState, InvalidArgument


@pytest.mark.parametrize("pages", [0, 1, 63, 64, 65, 4095, 4096, 4097, 70_000])
def test_hands_out_every_page_once_in_order(pages: int):
    allocator = PageAllocator(pages)
    assert [allocator.take() for _ in range(pages)] == list(range(pages))
    assert (allocator.take(), allocator.free, allocator.total) == (-1, 0, pages)
    allocator.check()
    for page in reversed(range(pages)):
        allocator.release(page)
    allocator.check()
    assert allocator.free == pages


@pytest.mark.parametrize(("pages", "seed"), [(7, 1), (130, 2), (5000, 3)])
def test_fuzz_against_a_set(pages: int, seed: int):
    rng = random.Random(seed)
    allocator, free, freed = PageAllocator(pages, track_freed=True), set(range(pages)), set[int]()
    for step in range(6000):
        if rng.random() < (0.7 if step // 1000 % 2 else 0.4):
            hint = rng.randrange(-1, pages + 2)
            later = [page for page in free if page >= max(hint, 0)]
            expected = min(later, default=min(free, default=-1)) if hint < pages else min(free, default=-1)
            assert allocator.take(hint) == expected
            free.discard(expected)
        elif len(free) < pages:
            page = rng.choice([page for page in rng.sample(range(pages), min(pages, 40)) if page not in free] or [-1])
            if page >= 0:
                allocator.release(page)
                free.add(page)
                freed.add(page)
        assert allocator.free == len(free)
        if step % 200 == 0:
            allocator.check()
            assert all(allocator.is_free(page) == (page in free) for page in range(pages))
            drained = memoryview(allocator._drain_freed()).cast("i").tolist()
            assert sorted(drained) == sorted(freed)
            freed.clear()


def test_refuses_double_release_and_foreign_pages():
    allocator = PageAllocator(3)
    page = allocator.take()
    allocator.release(page)
    with pytest.raises(CorruptState, match="already free"):
        allocator.release(page)
    for foreign in (-1, 3):
        with pytest.raises(InvalidArgument):
            allocator.release(foreign)
    assert allocator.free == 3
    for count in (-1, 2**31):
        with pytest.raises(InvalidArgument):
            PageAllocator(count)
