"""Which batches one captured graph is good for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from mtserve.engine.forward.metadata import SMALLEST_BUCKET, bucket_rows
from mtserve.kernels.attention.work import SMALLEST_TILE, TILES, WIDEST_HEAD_OF_LARGE_TILES

# Rows of the largest batch that usually waits for pages: what its users appended since, and candidates.
LOADED_ROWS = 4096


class GraphKey(NamedTuple):
    """What a captured graph is good for: any batch of this bucket, tile, mode of the attention's output and need to wait.

    Layers [first, last): all, or some of a split batch's, `early` of its first part. No layers: what the second part takes
    over from the first.
    """

    rows: int
    tile_rows: int
    direct: bool
    gated: bool  # waits for pages on their way
    first: int
    last: int
    early: bool = False


def segments(part: GraphKey, groups: Sequence[int], layers: int) -> list[GraphKey]:
    """The graphs, one behind the other, that make a part of a batch: a whole batch is one.

    Those of a split batch end where groups of layers do, whose first layers are `groups`: so most of them are good for
    batches that are split anywhere, which are hardly ever split at one layer often enough.
    """
    if not part.early and part.first == 0:
        return [part]
    bounds = [part.first, *(group for group in groups if part.first < group < part.last), part.last]
    run = [part._replace(first=first, last=last) for first, last in pairwise(bounds)]
    return run if part.early else [_taking_over(part.rows), *run]


def _taking_over(rows: int) -> GraphKey:
    return GraphKey(rows, 0, False, False, 0, 0)


def usual_keys(rows: int, layers: int, head_dim: int, *, deterministic: bool, loads: bool) -> Iterator[GraphKey]:
    """The graphs that serve nearly every batch of at most `rows` rows that is not split, the smallest bucket's first.

    `loads`: some batches wait for pages from the host, of users nearly all of whose rows come from there. Of those that are
    split there is what their second part takes over from the first.
    """
    tiles = TILES if head_dim <= WIDEST_HEAD_OF_LARGE_TILES else (SMALLEST_TILE,)
    bucket = SMALLEST_BUCKET
    while bucket <= bucket_rows(rows):
        for tile_rows in tiles:
            for direct in (False,) if deterministic else (False, True):
                yield GraphKey(bucket, tile_rows, direct, False, 0, layers)
        if loads and bucket <= LOADED_ROWS:
            yield from (GraphKey(bucket, tile_rows, False, True, 0, layers) for tile_rows in tiles)
            yield _taking_over(bucket)
        bucket = bucket_rows(bucket + 1)
