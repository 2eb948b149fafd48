"""Chained hashes of tokens: what states were computed from, in 8 bytes a token.

`chain[t] = xxh64(bytes of row t, seed=chain[t - 1])`, and `chain[-1]` is the root seed, which
stands for everything else the states depend on (model fingerprint, generation). Two equal
entries therefore mean two equal prefixes, up to xxh64's 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from mtserve import _core
from mtserve.errors import InvalidArgument
from mtserve.types import Chain


def digest(data: bytes, seed: int = 0) -> int:
    """xxh64 of `data`; `seed` is 0 to 2^64 - 1."""
    _check_seed(seed)
    return _core.digest(data, seed)


def extend_chain(chain_out: Chain, rows: npt.NDArray[Any], seed: int) -> None:
    """Fill `chain_out`, uint64 [n], with the chain of `rows`, C-contiguous [n, ...], that follows `seed`.

    `seed` is the chain's last entry before these rows, or the root seed. Raises InvalidArgument
    when shapes, dtypes or the seed do not fit, or n is above 2^24.
    """
    _check_seed(seed)
    _core.extend_chain(chain_out, rows, int(seed))


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise InvalidArgument(f"{seed} is outside 0 to 2^64 - 1", field="seed")
