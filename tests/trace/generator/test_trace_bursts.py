"""Bursts: what is measured, what is drawn, what they move."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from knob_traces import made
from trace_samples import shared_data

from mtserve.trace.burstiness import WINDOWS_S, burst_figures
from mtserve.trace.calibration import AZURE, BURST_LEVELS, GAP_LABELS
from mtserve.trace.generator.bursts import BurstConfig, BurstLoad, load_variance
from mtserve.trace.generator.clock import WeekConfig
from mtserve.trace.info import info
from mtserve.trace.schema import Trace


def starts_s(trace: Trace) -> np.ndarray:
    """Ascending seconds at which sessions start."""
    _, first = np.unique(trace.session, return_index=True)
    return np.sort(trace.t_ms[first]) / 1000


@pytest.mark.parametrize("like", sorted(BURST_LEVELS))
def test_moved_requests_have_the_published_load_variance(like: str) -> None:
    busy = {"users": 6_000, "requests": 900_000, "days": 3, "week": WeekConfig(night=0.0)}
    trace = made(**busy, bursts=BurstConfig(like=like, moves="requests"))
    figures = burst_figures(trace.t_ms / 1000)
    for window in map(str, WINDOWS_S):
        published = AZURE[like]["load_variance"][window]
        assert figures["load_variance"][window] == pytest.approx(published, rel=0.35), window


def test_moved_sessions_start_in_bursts_and_keep_every_gap() -> None:
    knobs = {"users": 3_000, "requests": 300_000, "week": WeekConfig(night=0.0)}
    plain, moved = made(**knobs), made(**knobs, bursts=BurstConfig(like="code"))
    figures = burst_figures(starts_s(moved))["load_variance"]
    for window in map(str, WINDOWS_S[:3]):
        assert figures[window] == pytest.approx(AZURE["code"]["load_variance"][window], rel=0.4), window
    assert burst_figures(starts_s(plain))["load_variance"]["10"] < 0.2
    before, after = info(plain)["gap_s"]["shares"], info(moved)["gap_s"]["shares"]
    for label in GAP_LABELS:
        assert after[label] == pytest.approx(before[label], abs=0.002), label
    assert np.array_equal(np.bincount(plain.user), np.bincount(moved.user))


def test_bursts_keep_the_hours() -> None:
    plain, moved = made(), made(bursts=BurstConfig(like="code", moves="requests", strength=2.0))
    assert np.array_equal(plain.t_ms // 3_600_000, moved.t_ms // 3_600_000)
    assert np.array_equal(plain.cand_lengths, moved.cand_lengths)
    calm = made(bursts=BurstConfig(like="code", strength=0.0))
    assert np.array_equal(plain.t_ms, calm.t_ms)


def test_a_drawn_load_has_the_variance_of_its_formula() -> None:
    levels = BURST_LEVELS["code"]
    load = BurstLoad.draw(np.random.default_rng(1), levels, 400_000.0)
    for window in (10.0, 60.0):
        means = np.diff(np.interp(np.arange(0, 400_001, window), load.edges, load.sums)) / window
        assert means.mean() == pytest.approx(1, abs=0.1)
        expected = load_variance(levels, np.array([window]))[0]
        assert means.var() / means.mean() ** 2 == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("service", sorted(AZURE))
def test_fitted_processes_have_the_published_load_variance(service: str) -> None:
    script = burst_script()
    fitted = script.within_hour(BURST_LEVELS[service], 3_450.0)
    for window, variance in zip(WINDOWS_S, fitted, strict=True):
        assert variance == pytest.approx(AZURE[service]["load_variance"][str(window)], rel=0.25), window


@pytest.mark.parametrize("service", sorted(AZURE))
def test_published_burst_figures_are_what_the_script_derives(service: str) -> None:
    script = burst_script()
    times = script.arrivals_s(
        shared_data("azure_llm_2023", f"AzureLLMInferenceTrace_{script.SERVICES[service]}.csv.xz")
    )
    figures = burst_figures(times, float(np.nextafter(times[-1], np.inf)))
    for name, published in AZURE[service].items():
        assert figures[name] == pytest.approx(published, rel=0.005), name


def burst_script() -> ModuleType:
    """scripts/burst_figures.py as a module."""
    path = Path(__file__).resolve().parents[3] / "scripts" / "burst_figures.py"
    spec = importlib.util.spec_from_file_location("burst_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_burst_figures_by_hand() -> None:
    even = burst_figures(np.arange(0, 7_200, 1.0) + 0.5)
    assert even["dispersion"] == {"1": 0.0, "10": 0.0, "60": 0.0, "300": 0.0}
    assert even["gap_scv"] == pytest.approx(0)
    assert even["minute_correlation"] is None, "counts that never vary"
    # Two arrivals in the first of ten windows: counts 2, 0, ..., 0 of mean 0.2 and variance 0.4.
    pair = burst_figures(np.array([1.0, 2.0]), block_s=100.0)
    assert pair["dispersion"]["10"] == pytest.approx(0.4 / 0.2)
    assert pair["load_variance"]["10"] is None, "the mean is not known well enough"
    assert pair["gap_scv"] is None
    poisson = burst_figures(np.sort(np.random.default_rng(0).random(200_000) * 36_000))
    assert poisson["gap_scv"] == pytest.approx(1, abs=0.02)
    for window in WINDOWS_S:
        assert poisson["dispersion"][str(window)] == pytest.approx(1, abs=0.3)
    assert set(burst_figures(np.empty(0))["dispersion"].values()) == {None}
