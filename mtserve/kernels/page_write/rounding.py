"""What pages of a shorter type than the model's keep of K and V: fp8 (e4m3), or the values as they are.

e4m3 has 3 bits behind the point of a number, and holds 2^-9 to 448. K and V are rounded to such numbers where they are
made, for all who attend to them, in their own batch as in later ones: how a history was cut into batches changes
nothing. bf16 and fp16 hold every such number, so that writing pages and reading them rounds nothing. There is no scale:
a norm comes before the projection, and `model/state_bound.py` says how large K and V can be.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
FP8_NAN = 0x7F  # one of its two bytes


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values`, of their own type, as pages of `dtype` give them back: nearest, half to even, at most LARGEST_FP8.

    NaN stays NaN. Pages that are not fp8 have the values' own type, and change nothing.
    """
    if dtype != FP8:
        return values
    return values.clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8).to(values.dtype)


def movable(pages: torch.Tensor) -> torch.Tensor:
    """A view of `pages` for picking and placing rows: fp8 as bytes, for which torch has that on every device."""
    return pages.view(torch.uint8) if pages.dtype == FP8 else pages
