"""The small copies of a batch, in and out: exact bytes, none beyond the size rounded up to 16."""

from __future__ import annotations

import pytest
import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.host_copy.cuda import BLOCK_BYTES, MAX_BLOCKS, HostCopy

pytestmark = pytest.mark.gpu
SIZES = [1, 16, 17, 4095, BLOCK_BYTES, BLOCK_BYTES + 16, 300_000, MAX_BLOCKS * BLOCK_BYTES * 3 + 48]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inwards", [True, False], ids=["to the device", "to the host"])
def test_copies_are_exact_and_touch_nothing_else(size: int, inwards: bool) -> None:
    whole = size + 64
    host = torch.randint(0, 256, (whole,), dtype=torch.uint8).pin_memory()
    device = torch.randint(0, 256, (whole,), dtype=torch.uint8, device="cuda")
    source, target = (host, device) if inwards else (device, host)
    copied = -(-size // 16) * 16
    expected = torch.cat((source[:copied].cpu(), target[copied:].cpu()))
    torch.cuda.synchronize()
    HostCopy().run(target.data_ptr(), source.data_ptr(), size)
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), expected)


def test_what_the_host_wrote_since_the_last_copy_is_seen() -> None:
    host, device = (
        torch.zeros(4096, dtype=torch.int32).pin_memory(),
        torch.empty(4096, dtype=torch.int32, device="cuda"),
    )
    copy = HostCopy()
    for turn in range(200):
        host.fill_(turn)
        copy.run(device.data_ptr(), host.data_ptr(), host.nbytes)
        assert bool((device == turn).all())  # waits for the copy


def test_nothing_is_copied_without_a_size_and_addresses_are_checked() -> None:
    device = torch.zeros(64, dtype=torch.uint8, device="cuda")
    copy = HostCopy()
    copy.run(device.data_ptr(), device.data_ptr() + 32, 0)
    for arguments in ((device.data_ptr() + 4, device.data_ptr(), 16), (device.data_ptr(), device.data_ptr(), -1)):
        with pytest.raises(InvalidArgument):
            copy.run(*arguments)
