"""What all benchmarks take on the command line, and how they write their file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("arguments")


def test_a_result_has_its_place_and_may_have_another(arguments: ModuleType) -> None:
    parser = arguments.make_parser("what it does", "cells.json", seed=True, cases=True)
    found = parser.parse_args([])
    assert (found.out, found.seed, found.only) == (BENCHMARKS / "results" / "cells.json", 0, "")
    found = parser.parse_args(["--out", "x.json", "--seed", "7", "--only", "B8"])
    assert (found.out, found.seed, found.only) == (Path("x.json"), 7, "B8")
    assert vars(arguments.make_parser("").parse_args([])) == {"out": None}


def test_a_report_is_written_where_no_folder_was(arguments: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    arguments.write_report({"rows": [1]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert path.read_text().endswith("}\n")


def test_without_a_device_the_benchmark_ends(arguments: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        arguments.require_gpu()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert arguments.require_gpu() is None
