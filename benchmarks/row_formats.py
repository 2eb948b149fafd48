"""The formats in which the host may keep a prefix, as values that went there and back, and what each may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mtserve.config import ModelConfig
from mtserve.kernels.host_format.reference import decode_rows, encode_rows
from mtserve.kernels.host_format.shape import FormatShape
from mtserve.kernels.page_write.rounding import FP8, rounded

PAGE_TOKENS = 64  # of the pages that a token's bytes are counted in


def through_pages(format: str, values: torch.Tensor) -> torch.Tensor:
    """`values` after packed pages of a host format: of K and V [layers, T, 2, H, D], or of inputs [layers, T, d].

    "kv" goes through bf16, in which a GPU computes states; the others take and give the values' own type.
    """
    stored = values.bfloat16() if format == "kv" else values
    layers, tokens = stored.shape[:2]
    of_states = stored.dim() == 5
    heads, head_dim, d = (*stored.shape[-2:], 1) if of_states else (1, 1, stored.shape[-1])
    shape = FormatShape(format, layers, tokens, heads, head_dim, d, stored.dtype)
    packed = torch.zeros(1, shape.bytes, dtype=torch.uint8, device=values.device)
    every = torch.arange(tokens, dtype=torch.int32, device=values.device)
    pages = torch.empty(1, layers, 2, tokens, heads, head_dim, dtype=stored.dtype, device=values.device)
    rows = torch.empty_like(stored)
    for layer in range(layers):
        sides = stored[layer].unbind(1) if of_states else (stored[layer],)
        encode_rows(shape, sides, packed, every, layer)
        decode_rows(shape, packed, every, layer, pages if of_states else rows[layer], every)
    return (pages[0].transpose(1, 2) if of_states else rows).to(values.dtype)


def through_fp8(values: torch.Tensor) -> torch.Tensor:
    """[..., n] values after fp8 e4m3 with one fp32 scale for each last dimension, so that the largest becomes 448."""
    scale = values.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def through_device_fp8(values: torch.Tensor) -> torch.Tensor:
    """`values` as the device's pages give them back with gpu_format fp8: no scale."""
    return rounded(values, FP8)


def unchanged(values: torch.Tensor) -> torch.Tensor:
    """The very values."""
    return values


@dataclass(frozen=True)
class Bounds:
    """The most that a format may change: relative L2 of the logits, order of the candidates, AUC."""

    relative_l2: float
    kendall_tau: float
    auc_change: float


@dataclass(frozen=True)
class Format:
    """One way to keep a prefix on the host, or on the device.

    `codec` takes values there and back. `of_input`: the normalised input [layers, T, d], from which K and V are
    projected again; else K and V [layers, T, 2, H, D] themselves. `layer_bytes`: bytes of one token and layer.
    `pages`: of a format of the device the type of its pages, through which whole passes go; None: a prefix comes from an
    exact pass.
    """

    name: str
    codec: Callable[[torch.Tensor], torch.Tensor]
    of_input: bool
    layer_bytes: Callable[[ModelConfig], float]
    bounds: Bounds | None = None
    pages: torch.dtype | None = None


def _page_bytes(format: str, config: ModelConfig) -> float:
    shape = FormatShape(format, 1, PAGE_TOKENS, config.heads, config.head_dim, config.d, torch.bfloat16)
    return shape.bytes / PAGE_TOKENS


def _of_pages(format: str, bounds: Bounds | None = None) -> Format:
    of_input = format.startswith("x")
    return Format(format, partial(through_pages, format), of_input, partial(_page_bytes, format), bounds)


INT8_BOUNDS, INT4_BOUNDS = Bounds(2e-3, 0.998, 2e-4), Bounds(1.5e-2, 0.99, 1e-3)
FP8_BOUNDS = Bounds(5e-3, 0.998, 5e-4)
FORMATS = (
    _of_pages("kv"),
    _of_pages("kv8", INT8_BOUNDS),
    _of_pages("x8", INT8_BOUNDS),
    _of_pages("x4", INT4_BOUNDS),
    Format("gpu fp8", through_device_fp8, False, lambda config: 2 * config.heads * config.head_dim, FP8_BOUNDS, FP8),
    # For comparison: what the host could keep, but does not.
    Format("kv fp8", through_fp8, False, lambda config: 2 * config.heads * (config.head_dim + 4)),
    Format("x fp8", through_fp8, True, lambda config: config.d + 4),
)
LOSSLESS = (
    Format("unchanged kv", unchanged, False, lambda config: 8 * config.heads * config.head_dim),
    Format("unchanged x", unchanged, True, lambda config: 4 * config.d),
)
NOTHING = Format("zeros", torch.zeros_like, False, lambda config: 0)
