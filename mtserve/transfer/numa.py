"""Where the machine's memory lies: the NUMA node beside a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SYSFS = Path("/sys")


def pci_id(device: torch.device) -> str:
    """The PCI address of a CUDA device, as sysfs spells it: "0000:3b:00.0"."""
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def node_of(sysfs: Path, pci: str) -> int | None:
    """The node that the device at PCI address `pci` is attached to.

    None on a machine of one node, and where the system does not say.
    """
    try:
        online = (sysfs / "devices/system/node/online").read_text(encoding="ascii").strip()
        node = int((sysfs / "bus/pci/devices" / pci / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    alone = online.isdigit()  # several read "0-1" or "0,2"
    return None if alone or node < 0 else node
