"""What a batch, and a load from the host, take on one machine with one model's shape: calibrated, or assumed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from mtserve import _core
from mtserve.errors import InvalidArgument

FREE_BYTES_PER_S = 1e18


@dataclass(frozen=True)
class Costs:
    """Figures of one machine. All times are seconds, none is negative.

    `link`: (bytes of a piece, bytes a second at which pieces of that size come), sizes rising; empty where the host
    brings nothing. `load_s`: latency of a load, whatever its size. Before the device's first layer a batch takes
    `batch_s + rows * plan_row_s`. A layer takes `layer_s + rows * row_s + pairs * pair_s`; `pairs` are the keys that its
    rows see, in all. `unpack_s`: of the device's time for a token and layer of what was loaded; 0 where states come as
    they are used.

    Raises InvalidArgument naming the field that is not so.
    """

    link: tuple[tuple[int, float], ...]
    load_s: float
    batch_s: float
    layer_s: float
    row_s: float
    pair_s: float
    unpack_s: float
    plan_row_s: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "link", _checked_link(self.link))
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise InvalidArgument(f"expected seconds from 0 on, got {value!r}", field=item.name)

    def compute_s(self, rows: int, pairs: int) -> float:
        """Seconds of one layer."""
        return self.core.compute_s(rows, pairs)

    def bytes_per_s(self, piece: int) -> float:
        """Rate of pieces of so many bytes, 1 or more. Between the sizes measured it is interpolated over the logarithm
        of the size; above them it stays, below them a piece takes as long as the smallest. InvalidArgument without a `link`.
        """
        return self.core.bytes_per_s(piece)

    @cached_property
    def core(self) -> _core._RestoreCosts:
        """The same for what is computed in C++."""
        return _core._RestoreCosts(**{item.name: getattr(self, item.name) for item in fields(self)})

    def __getstate__(self) -> dict[str, Any]:
        """What a copy in this process or another is made from: `core` is made there anew."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def to_table(self) -> dict[str, Any]:
        """JSON-able; `from_table` reads it."""
        return {**asdict(self), "link": [list(pair) for pair in self.link]}

    @classmethod
    def from_table(cls, table: object) -> Costs:
        """Raises InvalidArgument for an unknown or missing field, and for a value that is none."""
        if not isinstance(table, dict):
            raise InvalidArgument(f"expected a table, got {type(table).__name__}", field="costs")
        names = {item.name for item in fields(cls)}
        for problem, found in (("unknown", set(table) - names), ("missing", names - set(table))):
            if found:
                raise InvalidArgument(
                    f"{problem} field; known are {', '.join(sorted(names))}", field=min(map(str, found))
                )
        return cls(**table)


def costs_for_cpu() -> Costs:
    """For an engine on the CPU whose batches are to decide: loading is free, and every row takes some time."""
    return Costs(
        link=((1, FREE_BYTES_PER_S),), load_s=0.0, batch_s=0.0, layer_s=0.0, row_s=1e-6, pair_s=0.0, unpack_s=0.0
    )


def _checked_link(link: Sequence[Sequence[Any]]) -> tuple[tuple[int, float], ...]:
    """`link` as a tuple of tuples."""
    if not isinstance(link, (list, tuple)):
        raise InvalidArgument(f"expected pairs, got {link!r}", field="link")
    smaller = 0
    for pair in link:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InvalidArgument(f"expected pairs of bytes and bytes a second, got {pair!r}", field="link")
        size, rate = pair
        if not isinstance(size, int) or isinstance(size, bool) or size <= smaller:
            raise InvalidArgument(f"expected rising sizes from 1 byte on, got {size!r} after {smaller}", field="link")
        if not _is_number(rate) or not 0 < rate < math.inf:
            raise InvalidArgument(f"expected bytes a second above 0, got {rate!r}", field="link")
        smaller = size
    return tuple((size, float(rate)) for size, rate in link)


def _is_number(value: object) -> bool:
    """Whether it is one that a float can be: JSON's integers have no end."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
