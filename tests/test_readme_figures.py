"""The README's figures: each from its result file, and a file that is not there is named, not made up."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "readme_figures.py"
STAMP = {"commit": "abc", "seed": 3, "gpu": "some GPU", "processor": "some CPU"}
STEPS = {"launch_cpu_ms": 0.25, "gpu_ms": 1.5, "gap_ms": 0.01, "gpu_idle_share": 0.02, "requests_per_s": 999.6}
CLIENTS = {**STEPS, "threads": 64, "latency_p50_ms": 5.25, "latency_p99_ms": 7.75, "turns_ms": 5.0}
FEW = {**CLIENTS, "threads": 2, "latency_p50_ms": 1.25, "latency_p99_ms": 1.75}
LOOP = {
    "stamp": STAMP, "model": "hstu-512", "users": 64, "batch": 32, "history": 4096, "new": 4, "candidates": 256,
    "steps": STEPS, "clients": CLIENTS, "few": FEW,
    "clients sooner": {**CLIENTS, "turns_ms": 0.2}, "few sooner": {**FEW, "turns_ms": 0.2},
}  # fmt: skip
PRODUCT = {
    **STAMP,
    "rows": [
        {"shape": "projection T9 d8", "floor_ms": 0.002, "tile": "64x64", "tflops": 12.4,
         "ms": {"ours": 0.0031, "torch.mm alone": 0.0042}},
        {"shape": "output T9 d8", "floor_ms": 0.001, "tile": "64x128", "tflops": 9.6,
         "ms": {"ours": 0.0021, "torch.addmm": 0.0053, "torch.mm alone": 0.0032}},
    ],
}  # fmt: skip
FORWARD = {
    "stamp": STAMP,
    "results": [
        {"case": "old", "ms": 0.5, "floor_ms": 0.25, "public_ms": None},
        {"case": "new", "ms": 0.5, "floor_ms": 0.25, "public_ms": 1.5, "deterministic_ms": 0.625},
    ],
}

GPU_FORMAT = {
    "stamp": STAMP,
    "attention": [
        {"case": "cached B9", "native": {"ms": 0.05, "relative_l2": 2e-3}, "fp8": {"ms": 0.04, "relative_l2": 3e-3}}
    ],
    "layers": [
        {"case": "cached hstu B9", "native": {"ms": 0.5, "error": 4e-3, "users_per_gib": 1.94},
         "fp8": {"ms": 0.45, "error": 1e-2, "users_per_gib": 3.88}}
    ],
}  # fmt: skip

FORECAST = {
    **STAMP,
    "measured_on": {"gpu": "some GPU", "processor": "some CPU", "commit": "def"},
    "replays": {
        "short": {
            "found": {who: {"gpu": 0.5, "host": 0.25} for who in ("predicted", "measured")},
            "requests_per_s": {
                "measured": 100.0,
                "at_median": 130.0,
                "predicted": {"4": 150.0, "8": 90.0},
                "given": 140.0,
            },
            "off": {"4": 0.5, "8": -0.1},
            "p50_ms": {"measured": 2.0, "predicted": 1.5},
        }
    },
}
REPLACEMENT = {
    "stamp": STAMP,
    "model": "hstu-512",
    "results": [
        {"trace": "default", "users": 20, "requests": 30, "cells": [
            {"share": 0.05, "token_hit_percent": {"lru": lru, "locality": 71.0}}]}
        for lru in (70.0, 73.0)
    ],
    "summary": {"behind_the_best": {
        "cells_ahead_of_all_others": 1, "cells": 2, "target_points": 0.2,
        "beyond_target": [{"trace": "default", "share": 0.05, "points": 2.0, "best_other": "lru"}],
    }},
}  # fmt: skip
OPERATING = {
    "gpu_share": 0.1, "host_share": 1.0, "policy": "lru", "model": "hstu-512", "users": 20, "days": 7,
    "rows": [
        {"requests": 4000, "token": {"gpu": 0.75, "host": 0.125, "total": 0.875}, "token_after_first": {"total": 0.999},
         "first_share": 0.0625},
    ],
}  # fmt: skip


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with an empty folder of results."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("readme_figures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def _replay(**more: Any) -> dict[str, Any]:
    timing = {"latency_ms": {"p50": 2.0}, "throughput_rps": 10.0}
    ratios = {"token": {"gpu": 0.5, "host": 0.25, "total": 0.75}}
    return {**timing, "baseline": timing, "hit_ratio": ratios, "speedup": 1.0, "max_score_difference": 0.001, **more}


def test_missing_results_are_named_with_the_command_that_makes_them(script: ModuleType) -> None:
    lines = script.figures().splitlines()
    for name, command, _ in script.SECTIONS:
        assert f"`benchmarks/results/{name}` is not there yet: `{command}` writes it." in lines


def test_products_loop_and_deterministic_forward_are_shown(script: ModuleType) -> None:
    for name, content in (("loop", LOOP), ("product", PRODUCT), ("forward", FORWARD)):
        (script.RESULTS / f"{name}.json").write_text(json.dumps(content))
    lines = script.figures().splitlines()
    for row in (
        "| projection T9 d8 | 3.1 | 64x64 | 12 | 2.0 | - | 4.2 |",
        "| output T9 d8 | 2.1 | 64x128 | 10 | 1.0 | 5.3 | 3.2 |",
        "| old | 0.500 | - | 0.250 | - |",
        "| new | 0.500 | 0.625 | 0.250 | 1.50 |",
        "| hand, its queue full | 1.500 | 0.250 | 0.010 | 2.0 | 1000 | - / - |",
        "| 64 client threads, turns of 5 ms | 1.500 | 0.250 | 0.010 | 2.0 | 1000 | 5.2 / 7.8 |",
        "| 2 client threads, turns of 0.2 ms | 1.500 | 0.250 | 0.010 | 2.0 | 1000 | 1.2 / 1.8 |",
    ):
        assert row in lines
    assert sum("some GPU, commit abc, seed 3" in line for line in lines) == 3


def test_formats_of_the_device_are_shown_side_by_side(script: ModuleType) -> None:
    (script.RESULTS / "gpu_format.json").write_text(json.dumps(GPU_FORMAT))
    lines = script.figures().splitlines()
    assert "| attention cached B9 | 0.0500 | 0.0400 | 2.0e-03 | 3.0e-03 | - | - |" in lines
    assert "| layers cached hstu B9 | 0.5000 | 0.4500 | 4.0e-03 | 1.0e-02 | 1.9 | 3.9 |" in lines


def test_padding_has_a_column_where_a_replay_padded(script: ModuleType) -> None:
    from figures.replays import replay_rows

    plain = replay_rows({"a": _replay(), "b": _replay(padded_rows_share=None)})
    assert plain[0].endswith("| largest score difference |")
    assert plain[3] == "| b | 50.0 / 25.0 / 75.0 | 2.0 / 2.0 | 10.0 / 10.0 | 1.00 | 1.0e-03 |"
    padded = replay_rows({"a": _replay(), "b": _replay(padded_rows_share=0.0625)})
    assert padded[0].endswith("| rows computed as padding, % |")
    assert [row.split(" | ")[-1] for row in padded[2:]] == ["- |", "6.2 |"]


def test_forecasts_policies_and_the_operating_point_are_shown(script: ModuleType) -> None:
    from figures.simulations import operating_lines

    for name, content in (("forecast", FORECAST), ("replacement", REPLACEMENT)):
        (script.RESULTS / f"{name}.json").write_text(json.dumps(content))
    lines = [*script.figures().splitlines(), *operating_lines(OPERATING)]
    for row in (
        "| short | 50.0 / 25.0 | 50.0 / 25.0 | 100 | 130 | 150 (+50%) | 90 (-10%) | 140 | 2.0 | 1.5 |",
        "| default 5% | 71.50 | 71.00 |",
        "serve in 1 of 2 cells, and more than 0.2 points less than the best of them in: default 5% (2.00, lru).",
        "| 4,000 | 75.00 / 12.50 / 87.50 | 99.90 | 6.25 |",
    ):
        assert row in lines, row
