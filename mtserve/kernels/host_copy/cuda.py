"""Small copies between pinned host memory and the device by a kernel, so that they queue behind no other copy."""

from __future__ import annotations

import ctypes

from mtserve.errors import InvalidArgument
from mtserve.kernels.cuda.build import build
from mtserve.kernels.cuda.driver import Module

WORD_BYTES = 16
THREADS = 256
BLOCK_BYTES = THREADS * 4 * WORD_BYTES  # of one turn of a thread block
MAX_BLOCKS = 32  # have 512 KiB in flight, five times what the link needs


class HostCopy:
    """Copies between any two of device memory and pinned host memory.

    Raises BuildFailed where the kernel cannot be built.
    """

    def __init__(self) -> None:
        self._to, self._source, self._words = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        function = Module(build("host_copy", {})).function("host_copy", 0)
        self._launch = function.prepare(THREADS, self._to, self._source, self._words)

    def run(self, to: int, source: int, size: int, stream: int | None = None) -> None:
        """Queue a copy of `size` bytes, rounded up to 16, from address `source` to `to`, both multiples of 16.

        On the raw `stream`, None: torch's current one.

        Raises InvalidArgument for other addresses and for sizes outside 0 to 2^31 - 1.
        """
        if (to | source) % WORD_BYTES or not 0 <= size < 2**31:
            raise InvalidArgument(f"{size} bytes from {source:#x} to {to:#x}", field="host_copy")
        if size:
            blocks = min(MAX_BLOCKS, -(-size // BLOCK_BYTES))
            self._to.value, self._source.value, self._words.value = to, source, -(-size // WORD_BYTES)
            self._launch.run(blocks, stream)
