"""The file of calibrated costs: found again by an equal key, and never in the way."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from restore_samples import random_costs

from mtserve.restore.cache import FORMAT, CostCache, CostKey, default_path

KEY = CostKey("GPU", "driver 1", "cuda", 8, 512, 4, 128, "bfloat16", 64, "kv", "(1, 0, 64, 64)", 64 << 20)
COSTS, OTHERS = (random_costs(np.random.default_rng(seed)) for seed in range(2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not" / "yet" / "costs.json"


def test_what_was_put_is_found_by_another(path: Path) -> None:
    assert CostCache(path).get(KEY) is None
    CostCache(path).put(KEY, COSTS)
    assert CostCache(path).get(KEY) == COSTS
    CostCache(path).put(KEY, OTHERS)
    assert CostCache(path).get(KEY) == OTHERS
    assert len(json.loads(path.read_text())["entries"]) == 1
    assert os.listdir(path.parent) == [path.name]  # nothing partial stays


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CostKey)])
def test_every_part_of_a_key_counts(path: Path, field: str) -> None:
    value = getattr(KEY, field)
    other = not value if isinstance(value, bool) else value + ("!" if isinstance(value, str) else 1)
    cache = CostCache(path)
    cache.put(KEY, COSTS)
    assert cache.get(dataclasses.replace(KEY, **{field: other})) is None


def test_the_oldest_go_first(path: Path) -> None:
    cache = CostCache(path, entries=3)
    keys = [dataclasses.replace(KEY, layers=layers) for layers in range(1, 6)]
    for key in keys[:3]:
        cache.put(key, COSTS)
    cache.put(keys[0], OTHERS)  # again: it is the newest now
    cache.put(keys[3], COSTS)
    assert [cache.get(key) for key in keys] == [OTHERS, None, COSTS, COSTS, None]


GOOD = {"key": dataclasses.asdict(KEY), "costs": COSTS.to_table()}
FOREIGN: list[Any] = [
    b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"{}", b'"mtserve"',
    {"format": "mtserve costs 0", "entries": [GOOD]},
    {"format": FORMAT}, {"format": FORMAT, "entries": {}}, {"format": FORMAT, "entries": [3]},
    {"format": FORMAT, "entries": [{}]},
    {"format": FORMAT, "entries": [{**GOOD, "key": None}]},
    {"format": FORMAT, "entries": [{**GOOD, "key": {"gpu": "GPU"}}]},
    {"format": FORMAT, "entries": [{**GOOD, "key": {**GOOD["key"], "layers": "8"}}]},
    {"format": FORMAT, "entries": [{**GOOD, "key": {**GOOD["key"], "layers": []}}]},
    {"format": FORMAT, "entries": [{**GOOD, "costs": None}]},
    {"format": FORMAT, "entries": [{**GOOD, "costs": {**GOOD["costs"], "row_s": -1}}]},
    {"format": FORMAT, "entries": [{**GOOD, "costs": {**GOOD["costs"], "row_s": float("nan")}}]},
    {"format": FORMAT, "entries": [{**GOOD, "costs": {"row_s": 1}}]},
    {"format": FORMAT, "entries": [{**GOOD, "costs": {**GOOD["costs"], "row_s": 10**400}}]},
    {"format": FORMAT, "entries": [{**GOOD, "costs": {**GOOD["costs"], "link": [[1, 10**400]]}}]},
]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN)
def test_what_is_not_ours_is_passed_over_and_replaced(
    path: Path, content: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    cache = CostCache(path)
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    cache.put(KEY, COSTS)
    assert cache.get(KEY) == COSTS


def test_a_bad_entry_does_not_hide_the_good(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": FORMAT, "entries": [{"key": 1}, GOOD]}))
    assert CostCache(path).get(KEY) == COSTS


def test_what_cannot_be_read_or_written_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    beneath_a_file, a_folder = CostCache(tmp_path / "file" / "costs.json"), CostCache(tmp_path)
    for cache in (beneath_a_file, a_folder):
        caplog.clear()
        cache.put(KEY, COSTS)
        assert "were not kept" in caplog.text
        assert cache.get(KEY) is None
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_is_kept_without_a_path() -> None:
    cache = CostCache(None)
    cache.put(KEY, COSTS)
    assert cache.get(KEY) is None


def test_the_file_lies_where_the_system_keeps_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "mtserve" / "costs.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_path() == tmp_path / "home" / ".cache" / "mtserve" / "costs.json"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_path() is None
