"""What every store promises, case by case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from history_rows import SCHEMA, embedded, features, rows

from mtserve.config import HistoryConfig
from mtserve.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from mtserve.history import Append, HistoryStore, open_history
from mtserve.history.embedded import EmbeddedHistory
from mtserve.history.memory import MemoryHistory
from mtserve.history.store import MAX_APPENDS
from mtserve.model.schema import Feature, FeatureSchema


def test_put_creates_keeps_and_replaces(store: HistoryStore) -> None:
    assert store.put_user("a", features(3)) == 0
    assert store.append("a", rows(5, 6, 7)) == 3
    assert store.put_user("a", features(4)) == 3
    assert store.put_user("a", None, rows(1, 2)) == 2
    found = store.read("a")
    assert found.features is not None
    assert np.array_equal(found.features, features(4))
    assert (found.first, found.position) == (0, 2)
    assert found.behaviours["time_ms"].tolist() == [1, 2]
    assert store.put_user("a", None, rows()) == 0
    assert len(store.read("a").behaviours) == 0


def test_append_creates_unknown_user_at_zero(store: HistoryStore) -> None:
    with pytest.raises(FailedPrecondition) as error:
        store.append("new", rows(1), position=1)
    assert error.value.position == 0
    with pytest.raises(NotFound):
        store.append("new", rows())
    with pytest.raises(NotFound):
        store.position("new")
    assert store.append("new", rows(1), position=0) == 1
    assert store.read("new").features is None


@pytest.mark.parametrize(("position", "word"), [(2, "overlap"), (4, "gap"), (2**62, "gap")])
def test_gap_and_overlap_store_nothing(store: HistoryStore, position: int, word: str) -> None:
    store.append("a", rows(1, 2, 3))
    with pytest.raises(FailedPrecondition, match=word) as error:
        store.append("a", rows(4), position=position)
    assert error.value.position == 3
    assert "position 3" in str(error.value)
    assert store.read("a").behaviours["time_ms"].tolist() == [1, 2, 3]
    assert store.append("a", rows(4), position=3) == 4
    assert store.append("a", rows()) == 4


def test_times_never_decrease(store: HistoryStore) -> None:
    store.append("a", rows(10, 20))
    with pytest.raises(InvalidArgument, match=r"19 is before the previous behaviour's 20") as error:
        store.append("a", rows(19))
    assert error.value.field == "behaviours[0].time_ms"
    with pytest.raises(InvalidArgument) as error:
        store.append("a", rows(30, 31, 29))
    assert error.value.field == "behaviours[2].time_ms"
    with pytest.raises(InvalidArgument) as error:
        store.put_user("a", None, rows(-1))
    assert error.value.field == "history[0].time_ms"
    assert store.append("a", rows(20)) == 3


def test_append_many_gives_each_its_own_error(store: HistoryStore) -> None:
    store.append("a", rows(10))
    results = store.append_many(
        [
            Append("a", rows(11), 1),
            Append("a", rows(12), 1),
            Append("", rows(1)),
            Append("b", rows(5), 7),
            Append("a", rows(9)),
            Append("c", np.zeros(1, "<i8")),
            Append("d", rows(1, 2, 3, 4, 5)),
            Append("a", rows(12, 13), 2),
            Append("e", rows()),
        ]
    )
    good = {0: 2, 6: 5, 7: 4}
    assert {i: result for i, result in enumerate(results) if isinstance(result, int)} == good
    kinds = [FailedPrecondition, InvalidArgument, FailedPrecondition, InvalidArgument, InvalidArgument, NotFound]
    assert [type(result) for result in results if not isinstance(result, int)] == kinds
    assert store.read("a").behaviours["time_ms"].tolist() == [10, 11, 12, 13]
    assert sorted(store.users()) == ["a", "d"]
    assert store.append_many([]) == []


def test_read_last(store: HistoryStore) -> None:
    store.put_user("a", None, rows(*range(11)))
    for last in (0, 1, 3, 4, 5, 11, 12, 2**60):
        found = store.read("a", last=last)
        assert found.position == 11
        assert found.behaviours["time_ms"].tolist() == list(range(max(0, 11 - last), 11))
    with pytest.raises(NotFound, match="b"):
        store.read("b")


def test_what_was_read_never_changes(store: HistoryStore) -> None:
    store.put_user("a", features(1), rows(1, 2, 3, item=10))
    found = store.read("a")
    with pytest.raises(ValueError, match="read-only"):
        found.behaviours["item"][0] = 5
    store.truncate("a", 1)
    store.append("a", rows(7, 8, item=90))
    store.put_user("a", features(2))
    assert found.behaviours["item"].tolist() == [10, 11, 12]
    assert found.features is not None
    assert found.features["age"].tolist() == [1]


def test_store_keeps_a_copy_of_what_it_was_given(store: HistoryStore) -> None:
    given, who = rows(1, 2, 3, 4, 5, 6), features(1)
    store.put_user("a", who, given[::2])
    given["item"], who["age"] = 99, 99
    found = store.read("a")
    assert found.behaviours["item"].tolist() == [0, 2, 4]
    assert found.features is not None
    assert found.features["age"].tolist() == [1]


def test_truncate(store: HistoryStore) -> None:
    store.put_user("a", None, rows(*range(10, 20)))
    with pytest.raises(FailedPrecondition) as error:
        store.truncate("a", 11)
    assert error.value.position == 10
    for position in (10, 9, 8, 5, 4, 1):
        assert store.truncate("a", position) == position
        assert store.read("a").behaviours["time_ms"].tolist() == list(range(10, 10 + position))
        store.check()
    with pytest.raises(InvalidArgument):
        store.append("a", rows(9))
    assert store.truncate("a", 0) == 0
    assert store.append("a", rows(1)) == 1
    with pytest.raises(NotFound):
        store.truncate("b", 0)


def test_drop_before_keeps_positions_and_times(store: HistoryStore) -> None:
    store.put_user("a", None, rows(*range(10, 20)))
    first = store.drop_before("a", 8)
    assert first == 8
    assert store.drop_before("a", 3) == 8
    found = store.read("a")
    assert (found.first, found.position, found.behaviours["time_ms"].tolist()) == (8, 10, [18, 19])
    with pytest.raises(FailedPrecondition, match="delete the user") as error:
        store.truncate("a", 7)
    assert error.value.position == 10
    with pytest.raises(FailedPrecondition, match="past"):
        store.drop_before("a", 11)
    store.truncate("a", 8)
    store.check()
    with pytest.raises(InvalidArgument, match="16 is before"):
        store.append("a", rows(16))
    assert store.append("a", rows(17, 18), position=8) == 10


def test_delete_forgets_all(store: HistoryStore) -> None:
    store.put_user("a", features(1), rows(1, 2, 3, 4, 5))
    store.put_user("b", features(2), rows(7))
    assert store.count() == 2
    assert store.delete("a")
    assert not store.delete("a")
    assert (store.count(), list(store.users())) == (1, ["b"])
    assert store.append("a", rows(0)) == 1
    assert store.read("a").features is None


@pytest.mark.parametrize("user_id", ["", "x" * 257, "é" * 129, "\ud800", 7, None, b"a"])
def test_user_ids_are_bounded(store: HistoryStore, user_id: str) -> None:
    calls = [
        lambda: store.put_user(user_id, None),
        lambda: store.append(user_id, rows(1)),
        lambda: store.read(user_id),
        lambda: store.position(user_id),
        lambda: store.truncate(user_id, 0),
        lambda: store.drop_before(user_id, 0),
        lambda: store.delete(user_id),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument) as error:
            call()
        assert error.value.field == "user_id"
    assert store.count() == 0


def test_any_other_user_id_is_kept_apart(store: HistoryStore) -> None:
    names = ["x" * 256, "é" * 128, "\0", "a", "a\0", "A", " ", "'; DROP TABLE users"]
    for number, name in enumerate(names):
        store.append(name, rows(number))
    assert sorted(store.users()) == sorted(names)
    for number, name in enumerate(names):
        assert store.read(name).behaviours["time_ms"].tolist() == [number]


def test_arguments_are_bounded(store: HistoryStore) -> None:
    store.append("a", rows(*range(100)))
    bad = [
        (lambda: store.append("a", rows(*range(100, 201))), "behaviours"),
        (lambda: store.put_user("a", None, rows(*range(101))), "history"),
        (lambda: store.append("a", [1, 2]), "behaviours"),  # type: ignore[arg-type]
        (lambda: store.append("a", rows(100), position=-1), "position"),
        (lambda: store.append("a", rows(100), position=True), "position"),
        (lambda: store.truncate("a", -1), "position"),
        (lambda: store.truncate("a", 2**63), "position"),
        (lambda: store.drop_before("a", 1.5), "position"),  # type: ignore[arg-type]
        (lambda: store.read("a", last=-1), "last"),
        (lambda: store.put_user("a", rows(1)), "features"),
        (lambda: store.put_user("a", np.zeros(2, SCHEMA.user_dtype)), "features"),
        (lambda: store.append_many([Append("a", rows())] * (MAX_APPENDS + 1)), "appends"),
    ]
    for call, field in bad:
        with pytest.raises(InvalidArgument) as error:
            call()
        assert error.value.field == field
    assert store.position("a") == 100


def test_closed_store_is_unavailable(store: HistoryStore) -> None:
    store.append("a", rows(1))
    store.close()
    store.close()
    calls = [
        lambda: store.append("a", rows(2)),
        lambda: store.append_many([]),
        lambda: store.read("a"),
        lambda: store.position("a"),
        lambda: list(store.users()),
        lambda: store.count(),
        lambda: store.check(),
    ]
    for call in calls:
        with pytest.raises(Unavailable):
            call()
    store.check = lambda: None  # type: ignore[method-assign]  # the fixture's own check of an open store


def test_users_without_features_in_the_schema(tmp_path: Path) -> None:
    bare = FeatureSchema(user=(), behaviour=SCHEMA.behaviour, candidate=SCHEMA.candidate)
    for kind in ("memory", "embedded"):
        with open_history(HistoryConfig(kind=kind, path=str(tmp_path / "s")), bare) as store:
            store.put_user("a", bare.user_row({}), rows(1))
            store.append("b", rows(1))
            found = store.read("a").features
            assert found is not None
            assert found.shape == (1,)
            assert store.read("b").features is None
            store.check()


def test_factory_follows_the_configuration(tmp_path: Path) -> None:
    with open_history(HistoryConfig(kind="memory", max_append=2), SCHEMA) as store:
        assert isinstance(store, MemoryHistory)
        with pytest.raises(InvalidArgument, match="the limit is 2"):
            store.append("a", rows(1, 2, 3))
    config = HistoryConfig(path=str(tmp_path / "deep" / "er"), max_append=3)
    with open_history(config, SCHEMA) as store:
        assert isinstance(store, EmbeddedHistory)
        assert store.append("a", rows(1, 2, 3)) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot be used"):
        open_history(HistoryConfig(path=str(tmp_path / "file" / "x")), SCHEMA)


def test_users_are_listed_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.history.embedded.USERS_AT_ONCE", 3)
    with embedded(tmp_path) as store:
        for number in range(9):
            store.append(f"u{number}", rows(1))
        listing = store.users()
        first = next(listing)
        store.delete("u5")  # no lock is held while a caller iterates
        assert [first, *listing] == [f"u{number}" for number in range(9) if number != 5]


def test_a_wider_schema_feature_changes_the_row(tmp_path: Path) -> None:
    with embedded(tmp_path) as store:
        store.append("a", rows(1))
    wider = FeatureSchema(
        user=SCHEMA.user, behaviour=(*SCHEMA.behaviour, Feature("shop", buckets=2, dim=2)), candidate=SCHEMA.candidate
    )
    config = HistoryConfig(path=str(tmp_path))
    with pytest.raises(FailedPrecondition, match="another schema"):
        open_history(config, wider)
    with open_history(config, SCHEMA) as store:  # the refusal let go of the lock and changed nothing
        assert store.position("a") == 1
    rebucketed = FeatureSchema(
        user=SCHEMA.user,
        behaviour=(Feature("item", buckets=999, dim=64), SCHEMA.behaviour[1]),
        candidate=(Feature("item", buckets=999, dim=64),),
    )
    with open_history(config, rebucketed) as store:  # rows hold raw values: table shapes do not matter
        assert store.read("a").behaviours["time_ms"].tolist() == [1]
