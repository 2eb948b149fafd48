"""Small copies between pinned host memory and the device by a kernel, so that they queue behind no other copy."""

from __future__ import annotations

import ctypes

from mtserve.errors import InvalidArgument
from mtserve.kernels.cuda.build import build
from mtserve.kernels.cuda.driver import Module

WORD_BYTES = 16
BLOCK_BYTES = 256 * 4 * WORD_BYTES  # of one turn of a thread block
MAX_BLOCKS = 32  # have 512 KiB in flight, five times what the link needs


class HostCopy:
    """Copies between any two of device memory and pinned host memory, on the current stream.

    Raises BuildFailed where the kernel cannot be built.
    """

    def __init__(self) -> None:
        self._function = Module(build("host_copy", {})).function("host_copy", 0)

    def run(self, to: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes, rounded up to 16, from address `source` to `to`, both multiples of 16.

        Raises InvalidArgument for other addresses and for sizes outside 0 to 2^31 - 1.
        """
        if (to | source) % WORD_BYTES or not 0 <= size < 2**31:
            raise InvalidArgument(f"{size} bytes from {source:#x} to {to:#x}", field="host_copy")
        if size:
            blocks = min(MAX_BLOCKS, -(-size // BLOCK_BYTES))
            words = ctypes.c_int(-(-size // WORD_BYTES))
            self._function.launch(blocks, 256, ctypes.c_void_p(to), ctypes.c_void_p(source), words)
