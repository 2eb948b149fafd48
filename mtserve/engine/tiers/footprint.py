"""What one page of states takes in each tier."""

from __future__ import annotations

from typing import NamedTuple

from mtserve.config import EngineConfig, ModelConfig
from mtserve.kernels.host_format.shape import FormatShape
from mtserve.transfer.pool import PackedPageShape, PageShape
from mtserve.units import parse_capacity

MAX_BYTES = 1 << 62


class Footprint(NamedTuple):
    """Bytes of a page: on the device its states and their packed twin, on the host what it keeps of them."""

    gpu: int
    host: int

    @classmethod
    def of(cls, states: PageShape, packed: FormatShape | None) -> Footprint:
        """`packed`: the twin's shape, None where the states themselves cross the link."""
        return cls(states.bytes, states.bytes) if packed is None else cls(states.bytes + packed.bytes, packed.bytes)


def packed_format(model: ModelConfig, config: EngineConfig, states: PageShape) -> FormatShape | None:
    """The shape of the packed twins meant by `host_format`; None for "kv", and where there is no host tier.

    Raises InvalidArgument where the format does not fit the model's d.
    """
    if config.host_format == "kv" or parse_capacity(config.host_cache, of=MAX_BYTES, field="host_cache") == 0:
        return None
    return FormatShape(
        config.host_format, model.layers, config.page_tokens, model.heads, model.head_dim, model.d, states.dtype
    )


def link_shape(states: PageShape, packed: FormatShape | None) -> PageShape | PackedPageShape:
    """Of what crosses the link."""
    return states if packed is None else PackedPageShape(packed.layers, packed.layer_bytes)
