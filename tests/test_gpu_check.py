"""What gpu-check refuses, as far as that needs no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


def test_wasted_rows_fail_the_check(gpu_check: ModuleType) -> None:
    gpu_check.check_padding({"padded_rows_share": 0.149})
    with pytest.raises(SystemExit, match=r"15\.0% of the rows computed were padding; must be under 15%"):
        gpu_check.check_padding({"padded_rows_share": 0.15})
    with pytest.raises(SystemExit, match="did not run on the cuda kernels"):
        gpu_check.check_padding({"padded_rows_share": None})


def test_every_benchmark_it_runs_is_there(gpu_check: ModuleType) -> None:
    for name in gpu_check.BENCHMARKS:
        assert (BENCHMARKS / f"bench_{name}.py").is_file()


def test_states_that_were_lost_fail_the_check(gpu_check: ModuleType) -> None:
    gpu_check.check_returning({"hit_ratio": {"token": {"total": 0.99}}})
    with pytest.raises(SystemExit, match=r"98\.50% of the prefix tokens were found; must be above 98\.5%"):
        gpu_check.check_returning({"hit_ratio": {"token": {"total": 0.985}}})
