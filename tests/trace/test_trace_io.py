"""Trace files: round trips, the shared sample, and malformed input by file, line and field."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from trace_samples import sample_trace, shared_data

from mtserve.errors import FailedPrecondition, InvalidArgument, NotFound
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.io import SUFFIXES, read_trace, write_trace
from mtserve.trace.schema import Trace, TraceLimits

HISTORY = {"kind": "history", "user": "a", "t_ms": [1, 2], "items": [5, 6]}
REQUEST = {"kind": "request", "t_ms": 3, "user": "a", "session": 1, "cand": [7, 8], "clicked": [8]}


def put(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("requests", [0, 300])
def test_round_trip_is_exact(tmp_path: Path, suffix: str, requests: int) -> None:
    made = generate(GeneratorConfig(users=11, requests=requests, history_median=7, items=60))
    for number, trace in enumerate((sample_trace(), made)):
        write_trace(trace, tmp_path / f"{number}{suffix}")
        assert read_trace(tmp_path / f"{number}{suffix}") == trace


def test_jsonl_to_parquet_and_back_is_the_same_bytes(tmp_path: Path) -> None:
    write_trace(sample_trace(), tmp_path / "a.jsonl")
    write_trace(read_trace(tmp_path / "a.jsonl"), tmp_path / "b.parquet")
    write_trace(read_trace(tmp_path / "b.parquet"), tmp_path / "c.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_many_row_groups_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    from mtserve.trace import parquet

    monkeypatch.setattr(parquet, "ROWS", 37)
    monkeypatch.setattr(parquet, "GROUP_VALUES", 50)
    trace = generate(GeneratorConfig(users=40, requests=200, history_median=7, items=60))
    seen: list[tuple[int, int]] = []
    write_trace(trace, tmp_path / "t.parquet")
    groups = pyarrow.parquet.ParquetFile(tmp_path / "t.parquet").metadata.num_row_groups
    assert groups > 10
    assert read_trace(tmp_path / "t.parquet", progress=lambda *at: seen.append(at)) == trace
    assert seen[-1] == (groups, groups)


def test_gzip_bytes_repeat(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(sample_trace(), tmp_path / f"{name}.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    written: list[tuple[int, int]] = []
    read: list[tuple[int, int]] = []
    write_trace(sample_trace(), tmp_path / "a.jsonl", progress=lambda *at: written.append(at))
    read_trace(tmp_path / "a.jsonl", progress=lambda *at: read.append(at))
    assert written[-1] == (6, 6)
    assert read[-1][0] == read[-1][1] == (tmp_path / "a.jsonl").stat().st_size


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    target.write_text("old")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trace(sample_trace(), target, progress=stop)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_optional_fields_have_defaults(tmp_path: Path) -> None:
    request = {**REQUEST, "user": 12}
    del request["session"]
    trace = read_trace(put(tmp_path / "x.jsonl", HISTORY, request))
    assert trace.user_ids == ("a", "12")
    assert trace.request(0).session == 0
    assert trace.request(0).actions.tolist() == [1]
    assert len(trace.history(1).items) == 0
    assert not trace.meta.calibrated_synthetic


def test_the_meta_line_carries_what_the_documents_say(tmp_path: Path) -> None:
    write_trace(sample_trace(), tmp_path / "a.jsonl")
    first = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "meta"
    assert first["calibrated-synthetic"] is True
    assert first["seed"] == 3


def test_shared_sample_reads_as_it_is(tmp_path: Path) -> None:
    trace = read_trace(shared_data("ebnerd", "trace_dev.jsonl.gz"))
    assert (trace.users, trace.requests) == (19, 538)
    assert trace.meta.changes == {}
    write_trace(trace, tmp_path / "a.parquet")
    assert read_trace(tmp_path / "a.parquet") == trace


BROKEN: list[tuple[tuple[object, ...], int, str]] = [
    (("{",), 1, "line"),
    (("[1]",), 1, "line"),
    (("",), 1, "line"),
    (("[" * 100_000,), 1, "line"),
    ((HISTORY, {**REQUEST, "kind": "click"}), 2, "kind"),
    ((HISTORY, {"user": "a"}), 2, "kind"),
    ((HISTORY, {"kind": "meta"}), 2, "kind"),
    (({"kind": "meta", "seed": "x"},), 1, "seed"),
    (({"kind": "meta", "calibrated-synthetic": 1},), 1, "calibrated-synthetic"),
    (({"kind": "meta", "format": "other/2"},), 1, "format"),
    (({"kind": "meta", "config": {"a": []}},), 1, "config.a"),
    (({"kind": "meta", "nmae": "x"},), 1, "nmae"),
    ((HISTORY, HISTORY), 2, "user"),
    ((REQUEST, HISTORY), 2, "user"),
    (({**HISTORY, "user": True},), 1, "user"),
    (({**HISTORY, "user": ""},), 1, "user"),
    (({**HISTORY, "user": "x" * 257},), 1, "user"),
    (({**HISTORY, "user": 2**63},), 1, "user"),
    (('{"kind": "history", "user": "\\ud800", "t_ms": [], "items": []}',), 1, "user"),
    (({**HISTORY, "t_ms": [2, 1]},), 1, "t_ms[1]"),
    (({**HISTORY, "t_ms": [-1, 1]},), 1, "t_ms[0]"),
    (({**HISTORY, "t_ms": [1]},), 1, "t_ms"),
    (({**HISTORY, "items": [1, 2.0]},), 1, "items[1]"),
    (({**HISTORY, "items": [1, True]},), 1, "items[1]"),
    (({**HISTORY, "items": [2**63, 1]},), 1, "items[0]"),
    (({**HISTORY, "items": [1, -(2**63) - 1]},), 1, "items[1]"),
    (({**HISTORY, "items": "12"},), 1, "items"),
    (({**HISTORY, "actions": [1]},), 1, "actions"),
    (({**HISTORY, "actions": [1, 2**31]},), 1, "actions[1]"),
    (({**HISTORY, "action": [1, 2]},), 1, "action"),
    ((HISTORY, REQUEST, {**REQUEST, "t_ms": 2}), 3, "t_ms"),
    ((HISTORY, {**REQUEST, "t_ms": 1}), 2, "t_ms"),
    ((HISTORY, {**REQUEST, "t_ms": "3"}), 2, "t_ms"),
    ((HISTORY, {**REQUEST, "t_ms": -3}), 2, "t_ms"),
    ((HISTORY, {**REQUEST, "session": None}), 2, "session"),
    ((HISTORY, {**REQUEST, "cand": []}), 2, "cand"),
    ((HISTORY, {**REQUEST, "cand": [1, None]}), 2, "cand[1]"),
    ((HISTORY, {key: REQUEST[key] for key in REQUEST if key != "clicked"}), 2, "clicked"),
]


@pytest.mark.parametrize(("rows", "line", "field"), BROKEN)
def test_malformed_lines_are_named(tmp_path: Path, rows: tuple[object, ...], line: int, field: str) -> None:
    path = put(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(InvalidArgument) as caught:
        read_trace(path)
    assert caught.value.field == field
    assert f"bad.jsonl:{line}: " in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (TraceLimits(line_bytes=64), "line"),
        (TraceLimits(candidates=1), "cand"),
        (TraceLimits(history=1), "items"),
        (TraceLimits(users=1), "user"),
        (TraceLimits(requests=1), "line"),
    ],
)
def test_sizes_are_bounded(tmp_path: Path, limits: TraceLimits, field: str) -> None:
    path = put(tmp_path / "a.jsonl", HISTORY, REQUEST, {**REQUEST, "user": "b"})
    assert read_trace(path).requests == 2
    with pytest.raises(InvalidArgument) as caught:
        read_trace(path, limits)
    assert caught.value.field == field


def test_a_line_of_exactly_the_limit_passes(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", REQUEST)
    size = len(json.dumps(REQUEST))
    assert read_trace(path, TraceLimits(line_bytes=size)).requests == 1
    with pytest.raises(InvalidArgument, match="longer than"):
        read_trace(path, TraceLimits(line_bytes=size - 1))


def test_damaged_gzip_and_missing_files(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(HISTORY).encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "not.jsonl.gz").write_bytes(b"hello")
    (tmp_path / "not.parquet").write_bytes(b"hello")
    for name in ("cut.jsonl.gz", "not.jsonl.gz", "not.parquet"):
        with pytest.raises(InvalidArgument, match=name):
            read_trace(tmp_path / name)
    with pytest.raises(NotFound):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(InvalidArgument, match="path"):
        read_trace(tmp_path / "trace.csv")


def parquet_rows(path: Path, *rows: dict[str, object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("kind", "user", "t_ms", "session", "cand", "clicked", "times", "items", "actions")
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


P_HISTORY: dict[str, object] = {"kind": "history", "user": "a", "times": [1, 2], "items": [5, 6], "actions": [1, 4]}
P_REQUEST: dict[str, object] = {
    "kind": "request", "user": "a", "t_ms": 3, "session": 1, "cand": [7, 8], "clicked": [8],
}  # fmt: skip


def test_parquet_of_others_reads(tmp_path: Path) -> None:
    path = parquet_rows(tmp_path / "x.parquet", P_HISTORY, P_REQUEST, {**P_REQUEST, "user": "b", "session": None})
    trace = read_trace(path)
    assert trace.user_ids == ("a", "b")
    assert trace.session.tolist() == [1, 0]
    assert trace.history(0).actions.tolist() == [1, 4]
    assert trace.clicked_actions.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({**P_REQUEST, "kind": "click"}, "kind"),
        ({**P_REQUEST, "user": None}, "user"),
        ({**P_REQUEST, "user": "x" * 257}, "user"),
        ({**P_REQUEST, "t_ms": 1}, "t_ms"),
        ({**P_REQUEST, "t_ms": None}, "t_ms"),
        ({**P_REQUEST, "cand": None}, "cand"),
        ({**P_REQUEST, "cand": []}, "cand"),
        ({**P_REQUEST, "cand": [1, None]}, "cand"),
        ({**P_REQUEST, "actions": [1, 2]}, "actions"),
        ({**P_REQUEST, "actions": [-1]}, "actions"),
        ({**P_HISTORY}, "user"),
        ({**P_HISTORY, "user": "b", "times": [2, 1]}, "times"),
        ({**P_HISTORY, "user": "b", "times": [-2, 1]}, "times"),
        ({**P_HISTORY, "user": "b", "times": [1]}, "times"),
        ({**P_HISTORY, "user": "b", "items": None}, "items"),
    ],
)
def test_malformed_parquet_rows_are_named(tmp_path: Path, row: dict[str, object], field: str) -> None:
    path = parquet_rows(tmp_path / "bad.parquet", P_HISTORY, P_REQUEST, row)
    with pytest.raises(InvalidArgument) as caught:
        read_trace(path)
    assert caught.value.field == field
    assert "bad.parquet: row 3: " in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (TraceLimits(candidates=1), "cand"),
        (TraceLimits(history=1), "items"),
        (TraceLimits(users=1), "user"),
        (TraceLimits(requests=1), "rows"),
        (TraceLimits(row_group_bytes=64), "row_group"),
    ],
)
def test_parquet_sizes_are_bounded(tmp_path: Path, limits: TraceLimits, field: str) -> None:
    path = parquet_rows(tmp_path / "a.parquet", P_HISTORY, P_REQUEST, {**P_REQUEST, "user": "b"})
    with pytest.raises(InvalidArgument) as caught:
        read_trace(path, limits)
    assert caught.value.field == field


def test_parquet_with_other_columns_or_types(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"kind": ["request"]}), tmp_path / "few.parquet")
    with pytest.raises(InvalidArgument, match="user"):
        read_trace(tmp_path / "few.parquet")
    parquet_rows(tmp_path / "text.parquet", {**P_REQUEST, "cand": ["x"]})
    with pytest.raises(InvalidArgument, match="cand"):
        read_trace(tmp_path / "text.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace: Trace = sample_trace()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FailedPrecondition, match=r"\[trace\]"):
        write_trace(trace, tmp_path / "a.parquet")
    write_trace(trace, tmp_path / "a.jsonl")
    assert read_trace(tmp_path / "a.jsonl") == trace
