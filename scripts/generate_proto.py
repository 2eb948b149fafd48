"""Regenerate the gRPC stubs in mtserve/proto from proto/; `--check` only compares.

Needs grpcio-tools of the minor version pinned in pyproject.toml, because the stubs state it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "proto/mtserve/v1"
PACKAGE = "mtserve/proto/v1"
TOOLS = "1.71"


def generate(out: Path) -> None:
    """Write the stubs below `out`. Raises RuntimeError when protoc fails or has another version."""
    from grpc_tools import protoc

    installed = version("grpcio-tools")
    if not installed.startswith(TOOLS + "."):
        raise RuntimeError(f"grpcio-tools {installed} is installed; the stubs are made with {TOOLS}")
    words = [
        "protoc",
        # Mapping the folder to its Python package makes the stubs import each other by their real names.
        f"--proto_path={PACKAGE}={ROOT / SOURCE}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        *(f"{PACKAGE}/{path.name}" for path in sorted((ROOT / SOURCE).glob("*.proto"))),
    ]
    if protoc.main(words) != 0:
        raise RuntimeError("protoc failed")


def stale(fresh: Path) -> list[str]:
    """Stubs that differ between `fresh` and the checkout, or exist in only one of them."""
    names = _stubs(fresh / PACKAGE) | _stubs(ROOT / PACKAGE)
    return sorted(name for name in names if _read(fresh / PACKAGE / name) != _read(ROOT / PACKAGE / name))


def _stubs(folder: Path) -> set[str]:
    paths: Iterable[Path] = folder.glob("*_pb2*.py*")
    return {path.name for path in paths}


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the stubs are stale")
    check = parser.parse_args(words).check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        changed = stale(Path(folder))
        for name in changed:
            print(f"{'stale' if check else 'written'}: {PACKAGE}/{name}")
            fresh = _read(Path(folder) / PACKAGE / name)
            if not check:
                target = ROOT / PACKAGE / name
                target.unlink(missing_ok=True) if fresh is None else target.write_bytes(fresh)
    if check and changed:
        print("run scripts/generate_proto.py and commit the result", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
