"""Hold the demo's result against what the README promises: every key, agreement, and a real speedup."""

from __future__ import annotations

import json
import sys
from pathlib import Path

KEYS = {
    "requests", "users", "device", "model", "seed", "commit", "hit_ratio", "latency_ms",
    "throughput_rps", "baseline", "speedup", "max_score_difference",
}  # fmt: skip


def main() -> int:
    result = json.loads(Path(sys.argv[1]).read_text())
    missing = sorted(KEYS - set(result))
    if missing:
        print(f"missing keys: {', '.join(missing)}")
        return 1
    problems = []
    if not 0 <= result["max_score_difference"] <= 1e-5:
        problems.append(f"scores differ by {result['max_score_difference']}, the limit is 1e-5")
    if not result["speedup"] > 1:
        problems.append(f"the cached run is not faster: speedup {result['speedup']}")
    for unit in ("request", "token"):
        ratios = result["hit_ratio"][unit]
        if not (ratios["gpu"] > 0 and ratios["host"] > 0 and ratios["total"] <= 1):
            problems.append(f"hit ratios by {unit} are implausible: {ratios}")
    print(
        "\n".join(problems)
        or f"demo: speedup {result['speedup']:.2f}, largest score difference {result['max_score_difference']:.1e}"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
