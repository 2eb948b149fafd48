"""The kernels of one backend, chosen by name. What a backend cannot do raises; none stands in for another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from mtserve.errors import InvalidArgument

OPS = ("attention", "group_layer_norm", "norm_gate", "page_write", "projection_silu")
BACKENDS = ("eager", "reference")


@dataclass(frozen=True)
class Kernels:
    """One callable an op; signatures are those of each op's `reference.py`."""

    name: str
    attention: Callable[..., torch.Tensor]
    group_layer_norm: Callable[..., torch.Tensor]
    norm_gate: Callable[..., torch.Tensor]
    page_write: Callable[..., None]
    projection_silu: Callable[..., torch.Tensor]


def load_kernels(name: str) -> Kernels:
    """The kernels of backend `name`. Raises InvalidArgument for an unknown one."""
    if name not in BACKENDS:
        raise InvalidArgument(f"{name!r} is not one of {', '.join(BACKENDS)}", field="kernels")
    return Kernels(name, **{op: getattr(import_module(f"mtserve.kernels.{op}.{name}"), op) for op in OPS})
