"""What gpu-check refuses, as far as that needs no GPU."""

from __future__ import annotations

import importlib
import os
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

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


def test_each_process_has_another_device_first_and_sees_all(gpu_check: ModuleType) -> None:
    assert [gpu_check.first_device(number, 2)["CUDA_VISIBLE_DEVICES"] for number in range(4)] == ["0,1", "1,0"] * 2
    assert gpu_check.first_device(3, 1)["CUDA_VISIBLE_DEVICES"] == "0"


def test_every_replay_has_its_trace_and_is_verified(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple[Path, int]] = []
    monkeypatch.setattr(gpu_check, "generated_trace", lambda path, users, *_: drawn.append((path, users)) or path)
    monkeypatch.setattr(gpu_check, "ebnerd_trace", lambda: tmp_path / "real.jsonl.gz")
    words = gpu_check.replay_words(Namespace(users=200, requests=2000, seed=0), tmp_path)
    assert [users for _, users in drawn] == [200, gpu_check.RETURNING_USERS, gpu_check.RESTORING_USERS]
    assert len({each[0] for each in words.values()}) == len(drawn) + 1
    assert {gpu_check.GENERATED, gpu_check.RETURNING, *gpu_check.RESTORING_SETTINGS} < set(words)
    assert all("--verify" in each and "--gpu-cache" in each for each in words.values())


def test_tests_that_fail_or_do_not_run_fail_the_check(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(**changes: int) -> dict[str, int]:
        return {"tests": 3, "failures": 0, "errors": 0, "skipped": 0, "passed": 3, "status": 0, **changes}

    ran: list[int] = []

    def run(files: list[Path], *_: object) -> dict[str, int]:
        ran.append(len(files))
        return counts()

    monkeypatch.setattr(gpu_check, "run_share", run)
    assert gpu_check.run_tests(4, 2)["passed"] == 12
    assert sum(ran) == len(list((BENCHMARKS.parent / "tests" / "gpu").glob("test_*.py")))
    for wrong in (counts(failures=1, passed=2, status=1), counts(passed=0, skipped=3)):
        monkeypatch.setattr(gpu_check, "run_share", lambda *_, wrong=wrong: wrong)
        with pytest.raises(SystemExit, match="at least one must run and none may fail"):
            gpu_check.run_tests(1, 1)


def test_tests_that_hang_are_ended_and_say_where(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "test_hangs.py"
    path.write_text("import time, pytest\n\n\n@pytest.mark.gpu\ndef test_waits():\n    time.sleep(60)\n")
    monkeypatch.setattr(gpu_check, "HANGS_S", 1)
    monkeypatch.setattr(gpu_check, "TESTS_S", 10)
    with pytest.raises(SystemExit, match=r"test_hangs\.py were not over after 10 s"):
        gpu_check.run_share([path], tmp_path / "report.xml", dict(os.environ))
    assert "in test_waits" in capsys.readouterr().out


def test_a_replay_that_nothing_was_held_against_fails_the_check(gpu_check: ModuleType) -> None:
    def replay(requests: int) -> dict[str, Any]:
        return {"agreement": {"verified": {"requests": requests}}}

    gpu_check.check_verified({"one": replay(1)})
    with pytest.raises(SystemExit, match="no request was recomputed in fp32 of two"):
        gpu_check.check_verified({"one": replay(1), "two": replay(0)})
