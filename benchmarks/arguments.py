"""What benchmarks are told on the command line, and the file that they leave."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def make_parser(
    description: str | None, result: str = "", *, seed: bool = False, cases: bool = False
) -> argparse.ArgumentParser:
    """A parser with --out, `result` in the folder of results unless told otherwise, None where there is no `result`.

    `seed`: also --seed. `cases`: also --only, a part of the names of the cases to run.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / result if result else None, help="JSON file to write")
    if seed:
        parser.add_argument("--seed", type=int, default=0)
    if cases:
        parser.add_argument("--only", default="", help="cases whose name contains this")
    return parser


def require_gpu() -> None:
    """End the program where there is no CUDA device."""
    import torch  # which benchmarks of memory do without

    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; this benchmark is for a machine that has one")


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write `report` to `path`, whose folder is made where absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
