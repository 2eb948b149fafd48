"""Derives the burst figures of `mtserve/trace/calibration.py` from the Azure LLM inference trace of 2023.

    python scripts/burst_figures.py

Prints, for both services, the index of dispersion of counts and the variance of the load over windows of
1, 10, 60 and 300 s, the squared coefficient of variation of the inter-arrival times, the lag-1
autocorrelation of minute counts; the jump processes fitted to them; and what these give when arrivals are
drawn from them. The trace is not part of the project: MTSERVE_SHARED_DATA names the data folder (default
../shared/data or ./.data).

Azure LLM inference trace 2023, Microsoft, CC BY 4.0; P. Patel et al., "Splitwise: Efficient generative LLM
inference using phase splitting", ISCA 2024.
"""

from __future__ import annotations

import csv
import itertools
import json
import lzma
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve.trace.burstiness import WINDOWS_S, burst_figures  # noqa: E402
from mtserve.trace.generator.bursts import BurstLoad, load_variance  # noqa: E402

SERVICES = {"conversation": "conv", "code": "code"}
GRID = 13  # values of each parameter in a round
ROUNDS = 7
DRAWN_HOURS = 200
SEED = 0

Levels = tuple[tuple[float, float], tuple[float, float]]


def azure_file(service: str) -> Path | None:
    """The arrivals of one service, if they are here."""
    folders = [os.environ.get("MTSERVE_SHARED_DATA", ""), str(ROOT / ".data"), str(ROOT.parent / "shared" / "data")]
    for folder in filter(None, folders):
        path = Path(folder) / "azure_llm_2023" / f"AzureLLMInferenceTrace_{SERVICES[service]}.csv.xz"
        if path.is_file():
            return path
    return None


def arrivals_s(path: Path) -> np.ndarray:
    """Ascending seconds [N] from the first arrival."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        stamps = [row["TIMESTAMP"].strip() for row in csv.DictReader(lines)]
    times = np.sort(np.array(stamps, dtype="datetime64[ns]").astype(np.int64))
    return (times - times[0]) / 1e9


def within_hour(levels: Levels, block_s: float) -> np.ndarray:
    """[windows] the load variance that `burst_figures` finds on the mean in blocks of `block_s`."""
    windows = np.array(WINDOWS_S, dtype=np.float64)
    count = block_s // windows
    return (load_variance(levels, windows) - load_variance(levels, count * windows)) * count / (count - 1)


def fit(figures: dict[str, Any], block_s: float) -> Levels:
    """Least squares in the logs of the four load variances, on grids that close in."""
    aims = np.log([figures["load_variance"][str(window)] for window in WINDOWS_S])
    lows, highs = np.log([1.0, 0.001, 10.0, 0.001]), np.log([60.0, 20.0, 1800.0, 5.0])
    for _ in range(ROUNDS):
        best, found = np.inf, np.zeros(4)
        for point in itertools.product(*np.linspace(lows, highs, GRID).T):
            fast, fast_variance, slow, slow_variance = np.exp(point)
            variances = within_hour(((fast, fast_variance), (slow, slow_variance)), block_s)
            error = float(((np.log(np.maximum(variances, 1e-12)) - aims) ** 2).sum())
            if error < best:
                best, found = error, np.array(point)
        step = (highs - lows) / (GRID - 1)
        lows, highs = found - 1.5 * step, found + 1.5 * step
    values = [float(f"{value:.3g}") for value in np.exp(found)]
    return (values[0], values[1]), (values[2], values[3])


def drawn(levels: Levels, rate: float) -> dict[str, Any]:
    """Figures of DRAWN_HOURS hours of arrivals at `rate` a second, evenly spread and moved by the load."""
    rng = np.random.default_rng(SEED)
    load = BurstLoad.draw(rng, levels, DRAWN_HOURS * 3600.0)
    times = rng.random(int(rate * DRAWN_HOURS * 3600)) * DRAWN_HOURS * 3600
    hours = times // 3600 * 3600
    return burst_figures(np.sort(load.move(hours, times, hours + 3600)))


def main() -> int:
    for service in SERVICES:
        path = azure_file(service)
        if path is None:
            print("the Azure trace is not here; set MTSERVE_SHARED_DATA to the folder that holds azure_llm_2023")
            return 0
        times = arrivals_s(path)
        block_s = float(np.nextafter(times[-1], np.inf))
        figures = burst_figures(times, block_s)
        print(f"{service}: {len(times):,} arrivals in {times[-1]:,.0f} s")
        print("  published:", json.dumps(figures))
        print("  fitting (10 s or so)", flush=True)
        levels = fit(figures, block_s)
        print("  fitted (mean seconds, variance):", levels)
        print("  drawn:    ", json.dumps(drawn(levels, len(times) / times[-1])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
