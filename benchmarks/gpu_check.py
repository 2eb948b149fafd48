"""The GPU's own check: the tests marked `gpu`, then replays in bf16, one result file.

    make gpu-check                      needs a CUDA device and the packages of the interpreter it runs in
    python benchmarks/gpu_check.py --out DIR --users 200 --requests 2000

Fails when a test fails, when not a single GPU test ran, or when a replay's scores break the
exactness contract. The EB-NeRD replay needs its trace (MTSERVE_SHARED_DATA names the data
folder, default ../shared/data or ./.data) and says so where it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.provenance import stamp  # noqa: E402


def run_tests() -> dict[str, int]:
    """Counts of the tests marked gpu; exits when one failed or none ran."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", "-q", "-o", "addopts=", "tests"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if status != 0 or counts["passed"] == 0:
        sys.exit(f"GPU tests: {counts}; at least one must run and none may fail (pytest said {status})")
    return counts


def replay(trace: Path, out: Path, name: str, *options: str) -> dict[str, Any]:
    """The JSON of one replay on the GPU; exits when the replay itself says that scores disagree."""
    target = out / f"replay_{name}.json"
    command = [sys.executable, "-m", "mtserve.cli", "replay", str(trace), "--device", "cuda", "--json", str(target), *options]
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status != 0:
        sys.exit(f"replay {name} failed with status {status}")
    return json.loads(target.read_text())


def ebnerd_trace() -> Path | None:
    """The shared EB-NeRD trace, if it is here."""
    folders = [os.environ.get("MTSERVE_SHARED_DATA", ""), str(ROOT / ".data"), str(ROOT.parent / "shared" / "data")]
    for folder in filter(None, folders):
        path = Path(folder) / "ebnerd" / "trace_dev.jsonl.gz"
        if path.is_file():
            return path
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    parser.add_argument("--users", type=int, default=200, help="users of the generated trace")
    parser.add_argument("--requests", type=int, default=2000, help="requests of the generated trace")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; this check is for a machine that has one")
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"stamp": stamp(seed=options.seed, device="cuda:0"), "tests": run_tests(), "replays": {}}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        generated = scratch / "generated.jsonl.gz"
        size = ["--users", str(options.users), "--requests", str(options.requests), "--seed", str(options.seed)]
        subprocess.run(
            [sys.executable, "-m", "mtserve.cli", "trace", "generate", *size, "--out", str(generated)], cwd=ROOT, check=True
        )
        seed = ["--seed", str(options.seed)]
        ebnerd = ebnerd_trace()
        if ebnerd is None:
            print("the EB-NeRD trace is not here: its replay is left out")
        else:
            for share in ("10%ws", "25%ws", "50%ws", "100%ws"):
                name = f"ebnerd_hstu-512_gpu-{share.removesuffix('%ws')}"
                result["replays"][name] = replay(
                    ebnerd, scratch, name, "--model", "hstu-512", "--gpu-cache", share, "--host-cache", "100%ws",
                    "--verify", "40", *seed,
                )  # fmt: skip
        name = "generated_hstu-512"
        result["replays"][name] = replay(
            generated, scratch, name, "--model", "hstu-512", "--gpu-cache", "25%ws", "--host-cache", "100%ws",
            "--baseline-requests", "400", "--verify", "10", *seed,
        )  # fmt: skip
    target = options.out / "gpu_check.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
