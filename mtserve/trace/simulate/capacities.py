"""Sizes of tiers as one is asked for them: shares of the working set and bytes, in whole pages."""

from __future__ import annotations

from dataclasses import dataclass

from mtserve.errors import InvalidArgument
from mtserve.trace.working_set import resolve_capacity
from mtserve.units import parse_capacity

MAX_SIZES = 64


@dataclass(frozen=True)
class Capacity:
    """A tier's size: `text` as asked for, `pages` that fit, each of `page_bytes`; `share` of the working set's pages."""

    text: str
    pages: int
    page_bytes: int
    share: float

    @property
    def bytes(self) -> int:
        return self.pages * self.page_bytes


def split_list(text: str, field: str, most: int = MAX_SIZES) -> list[str]:
    """The parts of `text` between commas. Raises InvalidArgument for an empty or repeated one and for more than `most`."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > most:
        raise InvalidArgument(f"{len(parts)} values are more than {most}", field=field)
    for place, part in enumerate(parts):
        if not part:
            raise InvalidArgument(f"{text!r} has an empty value", field=field)
        if part in parts[:place]:
            raise InvalidArgument(f"{part!r} is named twice", field=field)
    return parts


def capacity(text: str, working_set: int, page_bytes: int, field: str) -> Capacity:
    """The tier meant by `text`: "5%" or "5%ws" of `working_set` pages, or bytes; "0" has no page.

    Raises InvalidArgument naming `field` where it is neither, or holds no page though it is not 0.
    """
    share = f"{text}ws" if text.rstrip().endswith("%") else text
    size = parse_capacity(resolve_capacity(share, working_set, page_bytes, field), of=0, field=field)
    pages = size // page_bytes
    if size and not pages:
        raise InvalidArgument(f"{text!r} holds no page, of which one takes {page_bytes:,} bytes", field=field)
    return Capacity(text, pages, page_bytes, pages / max(1, working_set))
