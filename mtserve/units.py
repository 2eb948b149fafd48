"""Parsing and printing of quantities with units: bytes, shares, durations."""

from __future__ import annotations

import re

from mtserve.errors import InvalidArgument

_BYTES = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)")


def parse_capacity(text: str | int, *, of: int, field: str) -> int:
    """Bytes meant by `text`: a number with a unit ("20GiB", "512 MB") or a share ("40%").

    `of` is what a share is taken of, in bytes. Raises InvalidArgument naming `field`.
    """
    if isinstance(text, int):
        amount, unit = float(text), ""
    else:
        match = _QUANTITY.fullmatch(text.strip())
        if match is None:
            raise InvalidArgument(f"{text!r} is not a capacity such as '20GiB' or '40%'", field=field)
        amount, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if not 0 <= amount <= 100:
            raise InvalidArgument(f"{text!r} is outside 0% to 100%", field=field)
        return int(of * amount / 100)
    if unit not in _BYTES:
        raise InvalidArgument(f"unknown unit in {text!r}; use B, KiB, MiB, GiB, TiB, KB, MB, GB, TB or %", field=field)
    size = int(amount * _BYTES[unit])
    if not 0 <= size < 2**50:
        raise InvalidArgument(f"{text!r} is outside 0 to 1 PiB", field=field)
    return size


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that keeps it at least 1: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
