"""The layers of one model with the kernels of the GPU: five launches a layer, static buffers, no allocation.

A sixth launch packs K and V, where that is what packed pages keep; the normalised rows are packed by the norm itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch

from mtserve.engine.forward.metadata import Metadata
from mtserve.errors import InvalidArgument
from mtserve.kernels.attention.cuda import AttentionKernel
from mtserve.kernels.attention.work import AttentionWork
from mtserve.kernels.group_layer_norm.triton import group_layer_norm
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.host_format.triton import encode_rows
from mtserve.kernels.norm_gate.triton import norm_gate
from mtserve.kernels.projection_silu.cuda import ProjectionKernel
from mtserve.kernels.residual_product.cuda import ResidualKernel
from mtserve.model.hstu import HSTULayer
from mtserve.model.ranking import RankingModel

# Partial sums are fp32 [splits, rows, width]; a bucket's splits are bounded so that they fit this.
PARTIAL_BYTES = 512 << 20
LEAST_SPLITS = 2  # of a deterministic plan that cuts nothing: one for each half


@dataclass(frozen=True)
class Buffers:
    """Activations of `rows` rows; every bucket uses the front of each."""

    x: torch.Tensor
    normalised: torch.Tensor
    mixed: torch.Tensor
    attended: torch.Tensor
    gated: torch.Tensor
    partial: torch.Tensor


class WorkOptions(TypedDict):
    """What the attention's planner is to know of the model and the device."""

    heads: int
    head_dim: int
    sms: int
    deterministic: bool


class Stack:
    """Runs layers over the first `bucket` rows of `buffers.x`, in place. Capturable as one CUDA graph.

    `packed` pages keep what the pages of `pool` with the same ids keep, in another format: both are written at once.
    `deterministic`: a row's result has the same bits in every batch. All but the attention always has that.
    """

    def __init__(
        self,
        model: RankingModel,
        pool: torch.Tensor | None,
        page_tokens: int,
        rows: int,
        *,
        packed: PackedPages | None = None,
        deterministic: bool = False,
    ) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        if config.d % 8:
            raise InvalidArgument(f"{config.d} is not a multiple of 8, as the matrix units want it", field="d")
        self._config, self._packed = config, packed
        self._layers = [layer for layer in model.layers if isinstance(layer, HSTULayer)]
        width = config.heads * config.head_dim
        self._projection = ProjectionKernel(config.d, width, dtype, page_tokens, config.layers, pool, device)
        self._attention = AttentionKernel(
            config.heads, config.head_dim, dtype, page_tokens, config.layers, pool, device, deterministic=deterministic
        )
        self._residual = ResidualKernel(width, config.d, dtype, device)
        # x leaves out the output biases: each reader adds the sum of those so far, and saves a pass over x a layer.
        biases = torch.stack([layer.output_bias.float() for layer in self._layers])
        self._offsets = torch.cat((torch.zeros_like(biases[:1]), biases.cumsum(0))).contiguous()

        least = LEAST_SPLITS * rows * width if deterministic else 0

        def zeros(columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=device)

        self.buffers = Buffers(
            x=zeros(config.d),
            normalised=zeros(config.d),
            mixed=zeros(4 * width),
            attended=zeros(width),
            gated=zeros(width),
            partial=torch.zeros(
                max(least, min(PARTIAL_BYTES // 4, 16 * rows * width)), dtype=torch.float32, device=device
            ),
        )

    @property
    def work_options(self) -> WorkOptions:
        """How to plan this stack's attention."""
        config, attention = self._config, self._attention
        return {
            "heads": config.heads,
            "head_dim": config.head_dim,
            "sms": attention.sms,
            "deterministic": attention.deterministic,
        }

    @property
    def final_offset(self) -> torch.Tensor:
        """fp32 [d]: what to add to the rows of x after the last layer."""
        return self._offsets[-1]

    def max_splits(self, bucket: int) -> int:
        """Partial sums a row that fit the buffer."""
        return min(16, len(self.buffers.partial) // (bucket * self._config.heads * self._config.head_dim))

    def run(
        self,
        bucket: int,
        metadata: Metadata,
        tile_rows: int,
        *,
        direct: bool,
        before_layer: Callable[[int], None] | None = None,
        first: int = 0,
        last: int | None = None,
        x: torch.Tensor | None = None,
    ) -> None:
        """Layers [first, last), to the end by default, on the current stream.

        `direct`: the attention's output needs no sum. `before_layer(i)` is called where what layer i waits for is to be
        queued. `x` [at least bucket, d], in place of `buffers.x`: rows as this stack's layers before `first` leave
        them, without those layers' output biases.
        """
        work = metadata.work(bucket, tile_rows)
        group, target = metadata.on_device(bucket, "group"), metadata.on_device(bucket, "target")
        x = (self.buffers.x if x is None else x)[:bucket]
        for index in range(first, len(self._layers) if last is None else last):
            if before_layer is not None:
                before_layer(index)
            self._layer(index, x, work, group, target, direct)

    def _layer(
        self, index: int, x: torch.Tensor, work: AttentionWork, group: torch.Tensor, target: torch.Tensor, direct: bool
    ) -> None:
        config, layer, buffers, rows = self._config, self._layers[index], self.buffers, len(x)
        width = config.heads * config.head_dim
        normalised, mixed = buffers.normalised[:rows], buffers.mixed[:rows]
        attended, gated = buffers.attended[:rows], buffers.gated[:rows]
        if not direct:
            splits = self.max_splits(rows)
            attended = buffers.partial[: splits * rows * width].view(splits, rows, width)
        packed = None if self._packed is None else self._packed.rows(target, index)
        inputs, states = (None, packed) if packed is not None and packed.shape.sides == 2 else (packed, None)
        group_layer_norm(x, layer.norm_weight, layer.norm_bias, group, self._offsets[index], normalised, inputs)
        self._projection.run(normalised, layer.uvqk_weight, layer.uvqk_bias, target, mixed, index)
        uvqk = mixed.view(rows, 4, config.heads, config.head_dim)
        if states is not None:
            encode_rows(states.shape, (uvqk[:, 3], uvqk[:, 1]), states.pages, states.target, states.layer)
        self._attention.run(uvqk, index, work, attended, config.attention_length)
        norm_gate(
            attended, mixed[:, :width], layer.gate_weight, layer.gate_bias, group, config.gate_first, work.splits, gated,
            halves=self._attention.deterministic,
        )  # fmt: skip
        self._residual.run(x, gated, layer.output_weight)
