"""Importers: small files of each public format, and the real MovieLens ratings where they are."""

from __future__ import annotations

import gzip
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from trace_samples import shared_data

from mtserve.errors import FailedPrecondition, InvalidArgument, NotFound
from mtserve.trace.importers import import_trace
from mtserve.trace.importers.config import ImportConfig, keeps
from mtserve.trace.schema import TraceLimits

KUAIRAND_HEADER = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,long_view,play_time_ms,tab"


def kuairand(path: Path, *rows: str) -> Path:
    path.write_text("\n".join((KUAIRAND_HEADER, *rows)) + "\n")
    return path


def exposure(user: int, video: int, t_ms: int, click: int = 0, like: int = 0, long: int = 0) -> str:
    return f"{user},{video},20220408,1400,{t_ms},{click},{like},0,{long},1234,1"


def test_kuairand_groups_exposures_to_requests(tmp_path: Path) -> None:
    one = kuairand(tmp_path / "a.csv", exposure(9, 4, 7000, 1, 1, 1), exposure(9, 1, 1000), exposure(9, 2, 1999, 1))
    two = kuairand(tmp_path / "b.csv", exposure(3, 7, 1500), exposure(9, 3, 2998, 1), exposure(9, 5, 3998))
    trace = import_trace("kuairand", [one, two])
    requests = [
        (r.user, r.t_ms, r.cand.tolist(), r.clicked.tolist(), r.actions.tolist()) for r in trace.iter_requests()
    ]
    assert requests == [
        ("9", 1000, [1, 2, 3], [2, 3], [1, 1]),
        ("3", 1500, [7], [], []),
        ("9", 3998, [5], [], []),
        ("9", 7000, [4], [4], [1 + 2 + 64]),
    ]
    assert trace.meta.name == "kuairand"
    assert len(trace.history_items) == 0


def test_kuairand_splits_what_passes_the_limit(tmp_path: Path) -> None:
    path = kuairand(tmp_path / "a.csv", *(exposure(1, video, 1000 + video) for video in range(5)))
    trace = import_trace("kuairand", path, limits=TraceLimits(candidates=2))
    assert trace.cand_lengths.tolist() == [2, 2, 1]
    assert trace.meta.changes["requests_split"] == 2


def test_kuairand_reads_gzip_blocks_and_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtserve.trace import text

    rows = [exposure(user, 1, 1000 * user) for user in range(1, 40)]
    path = tmp_path / "a.csv.gz"
    path.write_bytes(
        gzip.compress(("\ufeff" + "\r\n".join((KUAIRAND_HEADER.replace("user_id", '"user_id"'), *rows))).encode())
    )
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)
    assert import_trace("kuairand", path).requests == 39


@pytest.mark.parametrize(
    ("rows", "line", "field"),
    [
        ((exposure(1, 1, 1), "1,x,20220408,1400,5,1,0,0,0,1,1"), 3, "video_id"),
        ((exposure(1, 1, 1), f"{2**63},1,20220408,1400,5,1,0,0,0,1,1"), 3, "user_id"),
        ((exposure(1, 1, 1), "1,1,20220408,1400,,1,0,0,0,1,1"), 3, "time_ms"),
        ((exposure(1, 1, 1), "1,1"), 3, "time_ms"),
        ((exposure(1, 1, 1), "", exposure(1, 1, 1)), 3, "line"),
        ((exposure(1, 1, 1), "é"), 3, "line"),
        (("1" * 70_000,), 2, "line"),
    ],
)
def test_csv_errors_name_line_and_column(tmp_path: Path, rows: tuple[str, ...], line: int, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        import_trace("kuairand", kuairand(tmp_path / "bad.csv", *rows))
    assert caught.value.field == field
    assert f"bad.csv:{line}: " in str(caught.value)


def test_csv_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,video_id\n1,2\n")
    with pytest.raises(InvalidArgument, match="time_ms"):
        import_trace("kuairand", tmp_path / "a.csv")


def test_user_share_keeps_the_same_users_in_any_file(tmp_path: Path) -> None:
    path = kuairand(tmp_path / "a.csv", *(exposure(user, 1, 1000 * user) for user in range(1, 2001)))
    config = ImportConfig(user_share=0.25)
    trace = import_trace("kuairand", path, config)
    assert trace.users == pytest.approx(500, abs=60)
    assert set(trace.user_ids) == {str(u) for u in range(1, 2001) if keeps(np.array([u]), config)[0]}
    assert import_trace("kuairand", path, ImportConfig(user_share=0.0)).requests == 0


def ebnerd(tmp_path: Path) -> tuple[Path, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def at(second: int) -> datetime:
        return datetime(2023, 5, 23, 0, 0, second, 500_000)

    behaviors = {
        "impression_id": pa.array([1, 2, 3, 4], pa.uint32()),
        "user_id": pa.array([20, 10, 20, 20], pa.uint32()),
        "impression_time": pa.array([at(30), at(20), at(10), at(40)], pa.timestamp("us")),
        "session_id": pa.array([5, 6, 7, 5], pa.uint32()),
        "article_ids_inview": pa.array([[1, 2], [3], [4, 5, 6], []], pa.list_(pa.int32())),
        "article_ids_clicked": pa.array([[2], None, [6], []], pa.list_(pa.int32())),
    }
    history = {
        "user_id": pa.array([10, 20, 30], pa.uint32()),
        "impression_time_fixed": pa.array([[at(5), at(4)], [at(1), at(11)], [at(1)]], pa.list_(pa.timestamp("us"))),
        "article_id_fixed": pa.array([[50, 51], [60, 61], [70]], pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(behaviors), tmp_path / "behaviors.parquet", row_group_size=3)
    pq.write_table(pa.table(history), tmp_path / "history.parquet")
    return tmp_path / "behaviors.parquet", tmp_path / "history.parquet"


def test_ebnerd_sorts_clamps_and_counts(tmp_path: Path) -> None:
    behaviors, history = ebnerd(tmp_path)
    trace = import_trace("ebnerd", [history, behaviors])
    midnight = int(datetime(2023, 5, 23, tzinfo=UTC).timestamp()) * 1000
    requests = [
        (r.user, r.t_ms - midnight, r.session, r.cand.tolist(), r.clicked.tolist()) for r in trace.iter_requests()
    ]
    assert requests == [
        ("20", 10_500, 7, [4, 5, 6], [6]),
        ("10", 20_500, 6, [3], []),
        ("20", 30_500, 5, [1, 2], [2]),
    ]
    assert trace.user_ids == ("10", "20")
    assert trace.history(0).items.tolist() == [51, 50]
    assert (trace.history(1).t_ms - midnight).tolist() == [1_500, 10_500]
    assert trace.meta.changes == {
        "requests_without_candidates": 1,
        "requests_out_of_order": 2,
        "history_out_of_order": 1,
        "history_after_request": 1,
        "users_without_requests": 1,
    }


def test_ebnerd_without_history_or_with_foreign_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    behaviors, history = ebnerd(tmp_path)
    assert len(import_trace("ebnerd", behaviors).history_items) == 0
    with pytest.raises(InvalidArgument, match="behaviors"):
        import_trace("ebnerd", history)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InvalidArgument, match=r"other\.parquet"):
        import_trace("ebnerd", tmp_path / "other.parquet")


def test_ebnerd_names_the_column_at_fault(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    behaviors, _ = ebnerd(tmp_path)
    good = pq.read_table(behaviors)
    bad = {
        "user_id": pa.array([1, None, 2, 3]),
        "impression_time": pa.array(["a", "b", "c", "d"]),
        "article_ids_inview": pa.array([1, 2, 3, 4]),
    }
    for name, column in bad.items():
        pq.write_table(good.set_column(good.column_names.index(name), name, column), tmp_path / "bad.parquet")
        with pytest.raises(InvalidArgument) as caught:
            import_trace("ebnerd", tmp_path / "bad.parquet")
        assert caught.value.field == name
    with pytest.raises(InvalidArgument, match="row group 0"):
        import_trace("ebnerd", behaviors, limits=TraceLimits(row_group_bytes=64))


def mind(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


MIND = (
    "1\tU8\t11/15/2019 9:55:12 AM\tN10 N11\tN1-1 N2-0",
    "2\tU7\t11/15/2019 12:05:00 AM\t\tN3-0 N4-0 N5-1",
    "3\tU8\t11/15/2019 12:00:00 PM\tN99\tN6-0",
)


def test_mind_reads_impressions_and_makes_up_history_times(tmp_path: Path) -> None:
    trace = import_trace("mind", mind(tmp_path / "behaviors.tsv", *MIND))
    day = int(datetime(2019, 11, 15, tzinfo=UTC).timestamp()) * 1000
    first = day + ((9 * 60 + 55) * 60 + 12) * 1000
    requests = [(r.user, r.t_ms, r.cand.tolist(), r.clicked.tolist()) for r in trace.iter_requests()]
    assert requests == [
        ("U7", day + 300_000, [3, 4, 5], [5]),
        ("U8", first, [1, 2], [1]),
        ("U8", day + 43_200_000, [6], []),
    ]
    history = trace.history(trace.user_ids.index("U8"))
    assert history.items.tolist() == [10, 11]
    assert history.t_ms.tolist() == [first - 7_200_000, first - 3_600_000]
    assert trace.meta.changes["histories_ignored"] == 1
    assert trace.meta.changes["history_times_made_up"] == 2
    assert len(set(trace.session.tolist())) == 3
    assert 0 < import_trace("mind", tmp_path / "behaviors.tsv", ImportConfig(user_share=0.5, seed=1)).users < 2


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("1\tU8\t11/15/2019 9:55:12 AM\tN1", "line"),
        ("1\tU8\t2019-11-15\tN1\tN1-0", "time"),
        ("1\tU8\t13/15/2019 9:55:12 AM\tN1\tN1-0", "time"),
        ("1\tU8\t11/15/2019 13:55:12 PM\tN1\tN1-0", "time"),
        ("1\tU9\t11/15/2019 9:55:12 AM\tX1\tN1-0", "history"),
        ("1\tU8\t11/15/2019 9:55:12 AM\tN1\tN1", "impressions"),
        ("1\tU8\t11/15/2019 9:55:12 AM\tN1\tN1-2", "impressions"),
        ("1\tU8\t11/15/2019 9:55:12 AM\tN1\tN12345678901234567890-1", "impressions"),
        ("1\t\t11/15/2019 9:55:12 AM\tN1\tN1-1", "user"),
        ("1\tÜ\t11/15/2019 9:55:12 AM\tN1\tN1-1", "line"),
    ],
)
def test_mind_errors_name_line_and_column(tmp_path: Path, row: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        import_trace("mind", mind(tmp_path / "behaviors.tsv", *MIND, row))
    assert caught.value.field == field
    assert "behaviors.tsv:4: " in str(caught.value)


def test_mind_sizes_are_bounded(tmp_path: Path) -> None:
    path = mind(tmp_path / "behaviors.tsv", *MIND)
    for limits, field in (
        (TraceLimits(candidates=1), "impressions"),
        (TraceLimits(history=1), "history"),
        (TraceLimits(requests=2), "requests"),
        (TraceLimits(users=1), "users"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            import_trace("mind", path, limits=limits)
        assert caught.value.field == field


def movielens(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(("userId,movieId,rating,timestamp", *rows)) + "\n")
    return path


def test_movielens_ratings_are_requests_with_sampled_negatives(tmp_path: Path) -> None:
    rows = [f"{user},{movie},{0.5 * (movie % 10 + 1)},{1000 * user + movie}" for user in (2, 1) for movie in range(12)]
    extra = [f"3,{movie},4.0,{9000 + movie}" for movie in range(100, 112)]
    path = movielens(tmp_path / "ratings.csv", *rows, *extra)
    trace = import_trace("movielens", path, ImportConfig(negatives=5))
    assert trace.users == 3
    assert trace.requests == len(rows) + len(extra)
    assert (np.diff(trace.t_ms) >= 0).all()
    rated = {"1": set(range(12)), "2": set(range(12)), "3": set(range(100, 112))}
    places = []
    for request in trace.iter_requests():
        (positive,) = request.clicked.tolist()
        cand = request.cand.tolist()
        assert len(set(cand)) == len(cand) == 6
        assert set(cand) & rated[request.user] == {positive}
        places.append(cand.index(positive))
    assert set(places) == set(range(6))
    assert trace.request(0).actions.tolist() == [1]
    assert trace == import_trace("movielens", path, ImportConfig(negatives=5))
    other = import_trace("movielens", path, ImportConfig(negatives=5, seed=1))
    assert not np.array_equal(other.cand_items, trace.cand_items)


def test_movielens_of_one_who_rated_everything(tmp_path: Path) -> None:
    path = movielens(tmp_path / "ratings.csv", *(f"1,{movie},3.0,{movie}" for movie in range(4)))
    trace = import_trace("movielens", path)
    assert (trace.cand_lengths == 4).all()
    assert trace.meta.changes["negatives_rated"] == 12
    assert all(len(set(request.cand.tolist())) == 4 for request in trace.iter_requests())


def test_movielens_history_share(tmp_path: Path) -> None:
    path = movielens(tmp_path / "ratings.csv", *(f"1,{movie},3.0,{movie}" for movie in range(10)))
    trace = import_trace("movielens", path, ImportConfig(history_share=0.8, negatives=2))
    assert trace.requests == 2
    assert trace.history(0).items.tolist() == list(range(8))
    assert trace.history(0).actions.tolist() == [6] * 8


@pytest.mark.parametrize(
    ("row", "field"), [("1,1,x,5", "rating"), ("1,1,nan,5", "rating"), ("1,1,3.0,-5", "timestamp")]
)
def test_movielens_errors_name_the_column(tmp_path: Path, row: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        import_trace("movielens", movielens(tmp_path / "ratings.csv", "1,1,3.0,5", row))
    assert caught.value.field == field


def test_movielens_latest_small(tmp_path: Path) -> None:
    archive = zipfile.ZipFile(shared_data("ml_latest_small", "ml-latest-small.zip"))
    path = tmp_path / "ratings.csv"
    path.write_bytes(archive.read("ml-latest-small/ratings.csv"))
    trace = import_trace("movielens", path, ImportConfig(negatives=9, history_share=0.5))
    assert trace.users == 610
    assert trace.requests + len(trace.history_items) == 100_836
    assert (trace.cand_lengths == 10).all()
    assert "negatives_rated" not in trace.meta.changes


def test_wrong_kinds_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="kind"):
        import_trace("netflix", tmp_path)
    with pytest.raises(NotFound):
        import_trace("mind", tmp_path / "none.tsv")
    with pytest.raises(InvalidArgument, match="paths"):
        import_trace("mind", [])
    behaviors, _ = ebnerd(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(FailedPrecondition, match=r"\[trace\]"):
        import_trace("ebnerd", behaviors)
