"""What a result file says of its origin: commit, device, versions, seed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mtserve import __version__


def commit() -> str:
    """The checkout's commit, "-dirty" added when tracked files differ.

    MTSERVE_COMMIT names it where the tree came without its repository; else it is the package version.
    """
    if os.environ.get("MTSERVE_COMMIT"):
        return os.environ["MTSERVE_COMMIT"]
    root = Path(__file__).resolve().parent.parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{__version__}"


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """The CPU's name and core count."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def stamp(*, seed: int, device: str = "cpu") -> dict[str, Any]:
    """The facts every result file carries. `device`: "cpu" or a torch device such as "cuda:0"."""
    facts = {
        "commit": commit(),
        "seed": seed,
        "device": device,
        "processor": processor(),
        "python": sys.version.split()[0],
        "mtserve": __version__,
    }
    if device != "cpu":
        import torch

        facts |= {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    return facts
