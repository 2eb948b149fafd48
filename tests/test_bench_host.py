"""The engine's path on CUDA over a driver that does nothing still is the engine's: the benchmark runs, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_way_of_a_restored_batch_is_launched_and_answered(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "bench_host.py"),
        "--rounds",
        "2",
        "--only",
        "B1",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    report = json.loads(out.read_text())
    (ways,) = report["restored"].values()
    for way, steps in {"recompute": [], "load": ["link"], "split": ["link", "early"]}.items():
        times = [ways[way][name] for name in (*steps, "launched", "answered")]
        assert times == sorted(times) and times[0] > 0
    assert set(report["warm"]) == {"1", "8", "32"}
    assert all(each["us"] for each in report["rows"])
