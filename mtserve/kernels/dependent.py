"""Programmatic dependent launch for Triton kernels: a kernel starts while the one before it ends.

A kernel launched with `options` calls `start` first, and `wait` before it touches what kernels before it
on the stream write or read; what is constant during a batch (weights, metadata) it may load between the two. The first
kernel of a batch, ahead of which the metadata comes, calls `start` after `wait`, or is launched without.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room for it; it waits for this one's results itself."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended and their results are visible."""
    if PDL:
        gdc_wait()


def options(tensor: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel over `tensor`; the interpreter, on the CPU, knows no such launches."""
    return {"PDL": True, "launch_pdl": True} if tensor.is_cuda else {"PDL": False}
