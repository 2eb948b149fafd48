"""The token kernels in Triton against their reference: through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from token_batches import NAN, Made, make_token_batch, random_rows

from mtserve.kernels.token_embedding.packed import DEPTH_STEP, pack_tokens
from mtserve.kernels.token_embedding.reference import HOURS_OF_WEEK, splitmix64
from mtserve.kernels.token_embedding.reference import token_embedding as truth
from mtserve.kernels.token_embedding.triton import token_embedding
from mtserve.kernels.token_embedding.weights import Column, KindWeights, TokenWeights
from mtserve.types import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS, BUCKETS = 50, 9
# Each kind's columns: (buckets, width) of a table, or a dense feature's width. Behaviours and candidates are last.
KINDS: list[list[list[tuple[int, int] | int]]] = [
    [[(7, 5)], [3], [(5, 1)], [(97, 24), 1, (13, 3)], [(97, 24), 130, (1, 2), 7]],
    [[64], [(11, 16), (5, 48)]],
    [[2], [(7, 9)], [(101, 100), (3, 150)]],
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)
    torch.backends.cuda.matmul.allow_tf32 = False


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def _kind(columns: list[tuple[int, int] | int], timed: bool, d: int) -> tuple[KindWeights, np.dtype[np.void]]:
    """Weights of a kind, and its rows' type; one feature nobody reads lies in the middle of a row."""
    fields: list[tuple[object, ...]] = [("time_ms", "<i8")] if timed else []
    made = []
    for index, column in enumerate(columns):
        if isinstance(column, int):
            fields.append((f"f{index}", "<f4", (column,)))
            made.append(Column(_offset(fields), column))
        else:
            fields.append((f"f{index}", "<i8"))
            salt = int(torch.randint(2**62, ())) * 4 + 3
            made.append(Column(_offset(fields), column[1], _rand(*column), salt))
        if index == 0:
            fields.append(("unread", "<f4", (3,)))
    width = sum(column.width for column in made)
    linear = _rand(d, width) * width**-0.5, _rand(d), _rand(d, d) * d**-0.5, _rand(d)
    return KindWeights(tuple(made), *linear), np.dtype(fields)


def _offset(fields: list[tuple[object, ...]]) -> int:
    dtype = np.dtype(fields)
    assert dtype.fields is not None and dtype.names is not None
    return int(dtype.fields[dtype.names[-1]][1])


def _weights(
    kinds: list[list[tuple[int, int] | int]], d: int, dtype: torch.dtype = torch.float32
) -> tuple[TokenWeights, list[np.dtype[np.void]]]:
    made = [_kind(columns, index >= len(kinds) - 2, d) for index, columns in enumerate(kinds)]
    added = _rand(POSITIONS, d), _rand(BUCKETS, d), _rand(BUCKETS, d), _rand(HOURS_OF_WEEK, d)
    weights = TokenWeights(tuple(_to(kind, dtype) for kind, _ in made), *(table.to(dtype) for table in added))
    return weights, [row for _, row in made]


def _to(kind: KindWeights, dtype: torch.dtype) -> KindWeights:
    columns = (Column(c.offset, c.width, None if c.table is None else c.table.to(dtype), c.salt) for c in kind.columns)
    linear = kind.input_weight, kind.input_bias, kind.output_weight, kind.output_bias
    return KindWeights(tuple(columns), *(values.to(dtype) for values in linear))


def _batch(kinds: list[Rows], seed: int, tile: int = 128) -> Made:
    rng, capacity = np.random.default_rng(seed), sum(map(len, kinds)) + 5
    return make_token_batch(rng, kinds, capacity, positions=POSITIONS, buckets=BUCKETS, device=DEVICE, tile=tile)


def _random(dtypes: list[np.dtype[np.void]], counts: list[int], seed: int, tile: int = 128) -> Made:
    rng = np.random.default_rng(seed)
    rows = [random_rows(rng, dtype, count) for dtype, count in zip(dtypes, counts, strict=True)]
    return _batch(rows, seed, tile)


class _Run:
    """The kernels with scratch of NaN, over one batch after another."""

    def __init__(self, weights: TokenWeights, capacity: int) -> None:
        self.packed = pack_tokens(weights)
        like = weights.hour
        self.features = torch.full((capacity, self.packed.depth), NAN, dtype=like.dtype, device=DEVICE)
        self.hidden = torch.full((capacity, weights.d), NAN, dtype=like.dtype, device=DEVICE)

    def __call__(self, made: Made) -> torch.Tensor:
        rows, d = len(made.batch.row), self.hidden.shape[1]
        x = torch.full((rows, d), NAN, dtype=self.hidden.dtype, device=DEVICE)
        token_embedding(self.packed, made.batch, self.features, self.hidden, x, approximate=False)
        return x


def _check(weights: TokenWeights, made: Made, x: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Every token as the reference has it, every other row as it was."""
    expected = torch.full(x.shape, NAN)
    truth(weights, made.batch, expected)
    assert int(expected.isnan().all(1).sum()) == len(x) - made.tokens
    torch.testing.assert_close(x.float().cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("kinds", "d"), [(KINDS[0], 72), (KINDS[1], 64), (KINDS[2], 200)])
def test_tokens_of_every_kind(kinds: list[list[tuple[int, int] | int]], d: int) -> None:
    weights, dtypes = _weights(kinds, d)
    run = _Run(weights, 400)
    counts = [3, 1, 2, 17, 150][-len(kinds) :]
    for seed, tile in ((1, 128), (2, 37)):  # the second batch finds what the first left in the scratch
        made = _random(dtypes, counts, seed, tile)
        _check(weights, made, run(made))
        counts = [count // 2 for count in counts]


@pytest.mark.parametrize("counts", [[0, 0, 0], [5, 0, 0], [0, 33, 0], [0, 0, 129], [2, 0, 31]])
def test_kinds_without_a_token(counts: list[int]) -> None:
    weights, dtypes = _weights(KINDS[2], 64)
    made = _random(dtypes, counts, 3)
    _check(weights, made, _Run(weights, 200)(made))


def test_half_precision_rounds_the_sum_once() -> None:
    weights, dtypes = _weights(KINDS[0], 96, torch.float16)
    kinds = tuple(replace(kind, output_bias=kind.output_bias + 1000) for kind in weights.kinds)
    weights = replace(weights, kinds=kinds, position=weights.position * 0 - 1000, recency=weights.recency * 0 - 1000)
    made = _random(dtypes, [0, 0, 0, 40, 60], 4)
    _check(weights, made, _Run(weights, 200)(made), tolerance=4e-3)


def test_a_token_does_not_depend_on_its_company() -> None:
    weights, dtypes = _weights(KINDS[2], 72)
    rng = np.random.default_rng(5)
    run = _Run(weights, 500)
    rows = [random_rows(rng, dtype, count) for dtype, count in zip(dtypes, [3, 40, 170], strict=True)]
    made = _batch(rows, 6)
    every = run(made)
    for kind, start, stop in ((0, 2, 3), (1, 30, 40), (2, 127, 170)):
        # The interpreter's products come from a CPU library that sums by place: there, tokens stay in theirs.
        before = start if DEVICE == "cpu" else 1
        few = [random_rows(rng, dtype, 0) for dtype in dtypes]
        few[kind] = np.concatenate((random_rows(rng, dtypes[kind], before), rows[kind][start:stop]))
        other = _batch(few, 7)
        moved = slice(made.first[kind] + start, made.first[kind] + stop)
        tokens = slice(before, before + stop - start)
        for name in ("position", "bucket"):
            getattr(other.batch, name)[tokens] = getattr(made.batch, name)[moved]
        assert torch.equal(run(other)[other.rows(kind)[before:]], every[made.rows(kind)[start:stop]])


def test_hashes_reach_every_row_of_the_largest_table() -> None:
    buckets = 2**31
    table = torch.from_numpy(np.zeros((buckets, 2), np.float16)).to(DEVICE)  # pages that nobody writes take no memory
    ids = np.random.default_rng(8).integers(-(2**63), 2**63 - 1, 40)
    salt = 0xF123_4567_89AB_CDEF
    for number, value in enumerate(ids.tolist()):
        table[splitmix64((value & (2**64 - 1)) ^ salt) % buckets] = number + 1
    weights, dtypes = _weights([[(3, 2)], [(3, 2)]], 64, torch.float16)
    looked_up = replace(weights.kinds[1], columns=(Column(8, 2, table, salt),))
    run = _Run(replace(weights, kinds=(weights.kinds[0], looked_up)), 64)
    candidates = np.zeros(len(ids), dtypes[1])
    candidates["f0"] = ids
    run(_batch([np.zeros(0, dtypes[0]), candidates], 9))
    values = torch.arange(1, 41, device=DEVICE)[:, None].expand(40, 2)
    assert torch.equal(run.features[:40, :2].long(), values)
    assert not run.features[:40, 2:DEPTH_STEP].any()
