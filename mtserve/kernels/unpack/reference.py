"""K and V from packed pages, the truth: decoded and multiplied in fp32, rounded once."""

from __future__ import annotations

import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.host_format.reference import decode_rows
from mtserve.kernels.host_format.shape import FormatShape

FORMATS = ("x8", "x4", "kv8")
_K, _V = 3, 1  # of the columns u, v, q, k


def unpack_pages(
    shape: FormatShape, packed: torch.Tensor, pages: torch.Tensor, layer: int, weight: torch.Tensor, bias: torch.Tensor,
    pool: torch.Tensor,
) -> None:  # fmt: skip
    """Writes K and V of `layer` of the pages with ids `pages` (int [n], no two alike) into `pool`, and nothing else.

    packed: uint8 [pages, shape.bytes] of format "x8", "x4" or "kv8"; pool: [pages, layers, 2, page_tokens, H, D] of
    fp16, bf16 or fp32, in which page i is made from packed page i. weight [d, 4 * H * D] and bias [4 * H * D]: columns
    u, v, q, k; not read for "kv8". All page_tokens rows of a page are made. Raises InvalidArgument for another format.
    """
    if shape.format not in FORMATS:
        raise InvalidArgument(f"{shape.format!r} is not one of {', '.join(FORMATS)}", field="format")
    ids = pages.to(packed.device, torch.int64)
    token = torch.arange(shape.page_tokens, device=ids.device)
    source = (ids[:, None] * shape.page_tokens + token).flatten().to(torch.int32)
    if shape.format == "kv8":
        decode_rows(shape, packed, source, layer, pool, source)
        return
    x = torch.empty(len(source), shape.d, device=ids.device)
    decode_rows(shape, packed, source, layer, x, torch.arange(len(x), dtype=torch.int32, device=ids.device))
    width = shape.heads * shape.head_dim
    for side, part in enumerate((_K, _V)):
        columns = slice(part * width, (part + 1) * width)
        values = torch.nn.functional.silu(x @ weight[:, columns].float() + bias[columns].float())
        pool[ids, layer, side] = values.view(len(ids), *pool.shape[3:]).to(pool.dtype)
