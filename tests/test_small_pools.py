"""On virtual time, a GPU tier with room for fewer users than are in flight is never slower than none.

The times are a model's, drawn from seeds, and repeat on every machine.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.replay.features import TraceRows

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHORT = GeneratorConfig(
    users=16, requests=600, history_median=200, history_max=800, activity_sigma=0.3, candidates_mean=20
)
LONG = replace(SHORT, requests=300, history_median=6000, history_max=9000)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_small_pools")


def rate(bench: ModuleType, rows: TraceRows, setting: object, share: str, way: str) -> float:
    """Requests a second; of one seed alone, 3% more or less are chance."""
    return float(np.mean([bench.run(rows, setting, share, way, seed).log.throughput_rps for seed in range(4)]))


@pytest.mark.parametrize(("restore", "batch_ms"), [("auto", None), ("recompute", 1.0)])
def test_with_short_histories_no_room_costs_no_time(bench: ModuleType, restore: str, batch_ms: float | None) -> None:
    setting = bench.Setting(SHORT, batch_ms=batch_ms, restore=restore)
    rows = TraceRows(generate(SHORT), bench.small_states(bench.MODEL).schema)
    off = rate(bench, rows, setting, "", bench.OFF)
    rates = [rate(bench, rows, setting, share, bench.ENGINE) for share in ("5%ws", "10%ws", "25%ws", "100%ws")]
    assert min(rates) > (1 - bench.NOISE) * off
    assert rates[-1] == max(rates)
    assert rate(bench, rows, setting, "5%ws", bench.WAIT) < 0.8 * off  # what it is that makes the difference


@pytest.mark.parametrize("restore", ["auto", "load"])
def test_with_long_histories_room_stays_with_those_who_have_it(bench: ModuleType, restore: str) -> None:
    setting = bench.Setting(LONG, restore=restore)
    rows = TraceRows(generate(LONG), bench.small_states(bench.MODEL).schema)
    ways = {way: bench.summary([bench.run(rows, setting, "25%ws", way, seed=0)]) for way in (bench.WAIT, bench.ENGINE)}
    waits, engine = ways[bench.WAIT], ways[bench.ENGINE]
    assert engine["found"]["gpu"] > waits["found"]["gpu"] + 0.05
    assert engine["requests_per_s"]["mean"] > 1.05 * waits["requests_per_s"]["mean"]
    assert engine["latency_ms"]["p99"] < 2 * waits["latency_ms"]["p99"]  # nobody waits for ever
    if restore == "load":
        assert engine["found"]["total"] > waits["found"]["total"] - 0.02
        assert engine["spare_share"] == 0
