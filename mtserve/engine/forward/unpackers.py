"""What makes states of the packed pages that come over the link."""

from __future__ import annotations

import torch

from mtserve.cache.index import PageIds
from mtserve.kernels.host_format.packed import PackedPages
from mtserve.kernels.unpack.reference import unpack_pages
from mtserve.model.hstu import HSTULayer
from mtserve.model.ranking import RankingModel
from mtserve.transfer.mover import Unpacker


class TorchUnpacker:
    """In plain torch, a layer at a time, on any device."""

    kernel = None

    def __init__(self, packed: PackedPages, states: torch.Tensor, model: RankingModel) -> None:
        self.states, self._packed = states, packed
        self._layers = [layer for layer in model.layers if isinstance(layer, HSTULayer)]

    @torch.inference_mode()
    def unpack(self, pages: PageIds, first: int, last: int, stream: int) -> None:
        """As in Unpacker."""
        if not self.states.is_cuda:
            self._unpack(pages, first, last)
            return
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self.states.device)):
            self._unpack(pages, first, last)

    def _unpack(self, pages: PageIds, first: int, last: int) -> None:
        ids = torch.from_numpy(pages.copy()).to(self.states.device)
        for index, layer in list(enumerate(self._layers))[first:last]:
            unpack_pages(
                self._packed.shape, self._packed.pages, ids, index, layer.uvqk_weight, layer.uvqk_bias, self.states
            )


def make_unpacker(kernels: str, packed: PackedPages, states: torch.Tensor, model: RankingModel) -> Unpacker:
    """The unpacker for `kernels`, with `model`'s weights."""
    if kernels != "cuda":
        return TorchUnpacker(packed, states, model)
    # Only CUDA machines have what this kernel is built from.
    from mtserve.engine.forward.cuda_unpacker import CudaUnpacker

    return CudaUnpacker(packed, states, model)
