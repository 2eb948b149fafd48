"""Pinning of host memory, which the copy engine needs to reach it without the CPU."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from mtserve.kernels.cuda.driver import current_context, register_host, unregister_host, use_context


class Pinning(Protocol):
    """Pins ranges of whole pages of the system."""

    def pin(self, address: int, size: int) -> None:
        """Pin `size` bytes from `address`. Raises an MtserveError; nothing is pinned then."""

    def unpin(self, address: int) -> None:
        """Unpin what was pinned from `address`. Raises an MtserveError."""


class CudaPinning:
    """Pins through the CUDA driver, from any thread, and leaves the thread's context as it was.

    A call of the driver that fails is told here alone: it leaves no error that a later call of the CUDA runtime,
    and so of torch, would find.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes the device's context where nothing has yet
            self._context = current_context()

    def pin(self, address: int, size: int) -> None:
        with self._in_context():
            register_host(address, size)

    def unpin(self, address: int) -> None:
        with self._in_context():
            unregister_host(address)

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        previous = current_context()
        use_context(self._context)
        try:
            yield
        finally:
            use_context(previous)


def memlock_limit() -> str:
    """What `ulimit -l` prints, with its unit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
