"""Replays the real EB-NeRD trace at GPU-tier capacities of 10, 25, 50 and 100% of its final working set.

    python benchmarks/bench_replay.py                              CPU, float32, mtgr-small
    python benchmarks/bench_replay.py --device cuda --model hstu-512

Every request is scored cached and uncached; a replay whose scores disagree fails, and nothing is
reported. The trace is not part of the project: MTSERVE_SHARED_DATA names the data folder
(default ../shared/data or ./.data).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.provenance import stamp  # noqa: E402

SHARES = ("10%ws", "25%ws", "50%ws", "100%ws")


def ebnerd_trace() -> Path | None:
    """The shared EB-NeRD trace, if it is here."""
    folders = [os.environ.get("MTSERVE_SHARED_DATA", ""), str(ROOT / ".data"), str(ROOT.parent / "shared" / "data")]
    for folder in filter(None, folders):
        path = Path(folder) / "ebnerd" / "trace_dev.jsonl.gz"
        if path.is_file():
            return path
    return None


def replay(trace: Path, *options: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON of one replay, in this process's environment by default; exits when it says that scores disagree."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "replay.json"
        command = [sys.executable, "-m", "mtserve", "replay", str(trace), "--json", str(target), *options]
        print("$ mtserve", " ".join(command[3:]), flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False, env=environment).returncode
        if status != 0:
            sys.exit(f"the replay failed with status {status}")
        result: dict[str, Any] = json.loads(target.read_text())
        return result


def sweep(trace: Path, *options: str) -> dict[str, dict[str, Any]]:
    """One replay for each capacity of the GPU tier; the host tier holds the whole working set."""
    return {share: replay(trace, "--gpu-cache", share, "--host-cache", "100%ws", *options) for share in SHARES}


def table(replays: dict[str, dict[str, Any]]) -> str:
    """The sweep as text: hit ratios by tier, speed and agreement."""
    lines = [
        "GPU tier   requests gpu/host/all %   tokens gpu/host/all %   p50 ms cached/un   req/s cached/un   speedup   max score diff"
    ]
    for name, result in replays.items():
        ratios = [
            [f"{100 * result['hit_ratio'][unit][tier]:.1f}" for tier in ("gpu", "host", "total")]
            for unit in ("request", "token")
        ]
        base = result["baseline"]
        p50 = f"{result['latency_ms']['p50']:.1f} / {base['latency_ms']['p50']:.1f}"
        rate = f"{result['throughput_rps']:.1f} / {base['throughput_rps']:.1f}"
        lines.append(
            f"{name:<10} {' / '.join(ratios[0]):<25} {' / '.join(ratios[1]):<23} {p50:<18} {rate:<17} "
            f"{result['speedup']:<9.2f} {result['max_score_difference']:.1e}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mtgr-small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/replay_ebnerd_DEVICE.json)")
    options = parser.parse_args()
    trace = ebnerd_trace()
    if trace is None:
        print(
            "the EB-NeRD trace is not here; set MTSERVE_SHARED_DATA to the folder that holds ebnerd/trace_dev.jsonl.gz"
        )
        return 0
    seed = ["--seed", str(options.seed)]
    replays = sweep(trace, "--model", options.model, "--device", options.device, *seed)
    print(table(replays))
    device = "cpu" if options.device == "cpu" else "cuda:0"
    result = {"stamp": stamp(seed=options.seed, device=device), "replays": replays}
    target = options.out or ROOT / "benchmarks" / "results" / f"replay_ebnerd_{options.device}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
