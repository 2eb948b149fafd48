"""Arrays of one batch to the device in one copy, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

ALIGNMENT = 16
_TORCH = {"i8": torch.int64, "i4": torch.int32, "f4": torch.float32}


class Staging:
    """A ring of pinned buffers, each used again only when the batch that it served has been answered.

    Two suffice for a loop that plans one batch while the one before it runs.
    """

    def __init__(self, device: torch.device, depth: int = 2) -> None:
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8, pin_memory=True) for _ in range(depth)]
        self._turn = 0

    def upload(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        """The arrays (int64, int32 or float32) on the device, in order, by one copy on the current stream."""
        offsets, size = [], 0
        for array in arrays:
            offsets.append(size)
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        pinned = self._next(size)
        host = pinned.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        device = pinned[:size].to(self._device, non_blocking=True)
        return [
            device[offset : offset + array.nbytes].view(_TORCH[array.dtype.str[1:]]).view(array.shape)
            for array, offset in zip(arrays, offsets, strict=True)
        ]

    def _next(self, size: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._buffers)
        if len(self._buffers[self._turn]) < size:
            room = 1 << max(16, (size - 1).bit_length())
            self._buffers[self._turn] = torch.empty(room, dtype=torch.uint8, pin_memory=True)
        return self._buffers[self._turn]
