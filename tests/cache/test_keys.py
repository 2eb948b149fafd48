"""xxh64 against the reference package; chains against their definition."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from mtserve.cache.keys import digest, extend_chain
from mtserve.errors import InvalidArgument


def test_digest_equals_the_reference_on_every_short_length_and_random_ones():
    rng = random.Random(11)
    lengths = [*range(200), *(rng.randrange(200, 5000) for _ in range(100))]
    for length in lengths:
        data, seed = rng.randbytes(length), rng.getrandbits(64)
        assert digest(data, seed) == xxhash.xxh64_intdigest(data, seed)
    assert digest(b"") == 0xEF46DB3751D8E999
    assert digest(b"x", 2**64 - 1) == xxhash.xxh64_intdigest(b"x", 2**64 - 1)


@pytest.mark.parametrize("width", [1, 3, 37])
def test_chain_follows_its_definition_and_continues(width: int):
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 256, (29, width), dtype=np.uint8)
    chain = np.zeros(29, np.uint64)
    extend_chain(chain, rows, 17)
    seed = 17
    for row, entry in zip(rows, chain, strict=True):
        seed = xxhash.xxh64_intdigest(row.tobytes(), seed)
        assert int(entry) == seed
    parts = np.zeros(29, np.uint64)
    extend_chain(parts[:13], rows[:13], 17)
    extend_chain(parts[13:], rows[13:], int(parts[12]))
    assert np.array_equal(parts, chain)


def test_chain_of_structured_read_only_rows():
    rows = np.zeros(5, np.dtype([("time_ms", "<i8"), ("item", "<i8"), ("dense", "<f4", (3,))]))
    rows["item"] = range(5)
    rows.flags.writeable = False
    chain = np.zeros(5, np.uint64)
    extend_chain(chain, rows, 0)
    assert int(chain[0]) == xxhash.xxh64_intdigest(rows[:1].tobytes(), 0)
    assert len(set(chain.tolist())) == 5
    extend_chain(chain[:0], rows[:0], 0)


def test_chain_refuses_what_does_not_fit():
    rows = np.zeros((4, 2), np.int64)
    for out, given, seed in [
        (np.zeros(3, np.uint64), rows, 0),
        (np.zeros(4, np.float64), rows, 0),
        (np.zeros(4, np.uint32), rows, 0),
        (np.zeros(4, ">u8"), rows, 0),
        (np.zeros(8, np.uint64)[::2], rows, 0),
        (np.zeros(4, np.uint64), rows.T.reshape(4, 2, order="F"), 0),
        (np.zeros(4, np.uint64), rows, -1),
        (np.zeros(4, np.uint64), rows, 2**64),
    ]:
        with pytest.raises(InvalidArgument):
            extend_chain(out, given, seed)
    frozen = np.zeros(4, np.uint64)
    frozen.flags.writeable = False
    with pytest.raises(InvalidArgument, match="chain_out"):
        extend_chain(frozen, rows, 0)
