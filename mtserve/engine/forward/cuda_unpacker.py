"""The unpacker for the CUDA kernels: one launch for all layers and pages that have come together."""

from __future__ import annotations

import torch

from mtserve.cache.index import PageIds
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.unpack.cuda import UnpackKernel
from mtserve.model.hstu import HSTULayer
from mtserve.model.ranking import RankingModel


class CudaUnpacker:
    """Launches UnpackKernel with one model's weights."""

    def __init__(self, packed: PackedPages, states: torch.Tensor, model: RankingModel) -> None:
        self.states = states
        layers = [layer for layer in model.layers if isinstance(layer, HSTULayer)]
        weights, biases = [layer.uvqk_weight for layer in layers], [layer.uvqk_bias for layer in layers]
        self._kernel = UnpackKernel(packed.shape, packed.pages, states, weights, biases)
        self.kernel = self._kernel.for_queues()

    def unpack(self, pages: PageIds, first: int, last: int, stream: int) -> None:
        """As in Unpacker."""
        self._kernel.run(pages, first, last, stream)
