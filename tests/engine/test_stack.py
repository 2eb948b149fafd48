"""How the stack wires its kernels: what it packs, and runs of some layers only.

The matrix kernels, which want a GPU, are stood in for by plain torch; the row kernels are those of the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from small_models import small_model

from mtserve.engine.forward import stack as module
from mtserve.engine.forward.metadata import Capacity, Metadata, bucket_rows
from mtserve.engine.forward.stack import Stack
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.host_format.reference import encode_rows
from mtserve.kernels.host_format.shape import FormatShape
from mtserve.kernels.projection_silu.eager import projection_silu
from mtserve.model.ranking import RankingModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, PAGES, PAGE_TOKENS, HEADS, HEAD_DIM, D, ROWS = 3, 4, 5, 2, 16, 32, 17
BUCKET = bucket_rows(ROWS)
FORMATS = ["kv8", "x8", "x4"]


class Projection:
    """Plain torch, and a record of each layer's normalised rows and of what it made of them."""

    def __init__(self, *_: Any) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, mixed: torch.Tensor,
        layer: int,
    ) -> None:  # fmt: skip
        mixed.copy_(projection_silu(x, weight, bias))
        self.seen[layer] = x.clone(), mixed.clone()


class Attention:
    """Of no row to another, but of q, k and v all."""

    sms, deterministic = 1, False

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def run(self, uvqk: torch.Tensor, layer: int, work: object, attended: torch.Tensor, length: int) -> None:
        attended.copy_((uvqk[:, 1] + uvqk[:, 2] * uvqk[:, 3]).flatten(1))


class Residual:
    def __init__(self, *_: Any) -> None:
        pass

    def run(self, x: torch.Tensor, gated: torch.Tensor, weight: torch.Tensor) -> None:
        x.addmm_(gated, weight)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankingModel]:
    torch.manual_seed(7)
    for name, plain in (("ProjectionKernel", Projection), ("AttentionKernel", Attention), ("ResidualKernel", Residual)):
        monkeypatch.setattr(module, name, plain)
    with torch.inference_mode():
        yield small_model(layers=LAYERS, d=D, heads=HEADS, head_dim=HEAD_DIM).to(DEVICE)


def _packed(format: str) -> PackedPages:
    """Pages of 0xFF."""
    shape = FormatShape(format, LAYERS, PAGE_TOKENS, HEADS, HEAD_DIM, D, torch.float32)
    return PackedPages(shape, torch.full((PAGES, shape.bytes), 255, dtype=torch.uint8, device=DEVICE))


def _metadata(model: RankingModel) -> Metadata:
    """Of ROWS rows, some of them kept, and padding up to a bucket."""
    metadata = Metadata(Capacity.of(model.schema, BUCKET, 1, PAGES), DEVICE)
    arrays = metadata.room(BUCKET)
    rng = np.random.default_rng(3)
    arrays.group[:ROWS], arrays.target[ROWS:] = rng.integers(0, 4, ROWS), -1
    arrays.target[:ROWS] = np.where(rng.random(ROWS) < 0.3, -1, rng.permutation(PAGES * PAGE_TOKENS)[:ROWS])
    device, pinned, _ = metadata.to_copy(BUCKET, 0)
    device.copy_(pinned)
    return metadata


def _stack(model: RankingModel, packed: PackedPages | None) -> tuple[Stack, Projection]:
    stack = Stack(model, None, PAGE_TOKENS, BUCKET, packed=packed)
    projection: Any = stack._projection
    stack.buffers.x.copy_(torch.randn(BUCKET, D, generator=torch.Generator().manual_seed(5)))
    return stack, projection


@pytest.mark.parametrize("format", FORMATS)
def test_packs_what_its_format_keeps(model: RankingModel, format: str) -> None:
    packed, expected, metadata = _packed(format), _packed(format), _metadata(model)
    stack, projection = _stack(model, packed)
    stack.run(BUCKET, metadata, 64, direct=True)
    target = metadata.on_device(BUCKET, "target")
    assert int((target >= 0).sum()) > 5
    for layer, (normalised, mixed) in projection.seen.items():
        _, v, _, k = mixed.view(BUCKET, 4, HEADS, HEAD_DIM).unbind(1)
        rows = (k, v) if format == "kv8" else (normalised,)
        encode_rows(expected.shape, rows, expected.pages, target, layer)
    assert sorted(projection.seen) == list(range(LAYERS))
    assert torch.equal(packed.pages, expected.pages)
    unpacked, _ = _stack(model, None)
    unpacked.run(BUCKET, metadata, 64, direct=True)
    assert torch.equal(unpacked.buffers.x, stack.buffers.x)


@pytest.mark.parametrize(("format", "first"), [("kv8", 1), ("x8", 2), ("x4", 0), ("x4", LAYERS)])
def test_some_layers_and_then_the_others_over_rows_elsewhere(model: RankingModel, format: str, first: int) -> None:
    whole, parts, metadata = _packed(format), _packed(format), _metadata(model)
    stack, _ = _stack(model, whole)
    stack.run(BUCKET, metadata, 64, direct=True)
    split, projection = _stack(model, parts)
    called: list[int] = []
    split.run(BUCKET, metadata, 64, direct=True, before_layer=called.append, last=first)
    assert called == sorted(projection.seen) == list(range(first))
    assert (parts.pages[:, first * parts.shape.layer_bytes :] == 255).all()
    elsewhere = torch.zeros(BUCKET + 3, D, device=DEVICE)
    elsewhere[:BUCKET] = split.buffers.x
    left = split.buffers.x.clone()
    split.run(BUCKET, metadata, 64, direct=True, before_layer=called.append, first=first, x=elsewhere)
    assert called == list(range(LAYERS))
    assert torch.equal(split.buffers.x, left) and not elsewhere[BUCKET:].any()
    assert torch.equal(elsewhere[:BUCKET], stack.buffers.x)
    assert torch.equal(parts.pages, whole.pages)
