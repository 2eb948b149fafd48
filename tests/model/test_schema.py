"""Rows from columns: what does not fit is refused by the name of its field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import SCHEMA

from mtserve.errors import InvalidArgument
from mtserve.model.schema import MAX_FEATURES, Feature, FeatureSchema


def _field(call: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        call()
    return caught.value.field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": "two words"}, "feature.name"),
        ({"name": "time_ms"}, "feature.name"),
        ({"name": "x", "kind": "text"}, "x.kind"),
        ({"name": "x", "role": "extra", "buckets": 2, "dim": 2}, "x.role"),
        ({"name": "x", "buckets": 0, "dim": 2}, "x.buckets"),
        ({"name": "x", "buckets": 2**31 + 1, "dim": 2}, "x.buckets"),
        ({"name": "x", "buckets": 2, "dim": 0}, "x.dim"),
        ({"name": "x", "kind": "dense", "width": 0}, "x.width"),
        ({"name": "x", "kind": "dense", "width": 65537}, "x.width"),
    ],
)
def test_features_out_of_bounds_are_refused(options: dict[str, Any], field: str) -> None:
    assert _field(lambda: Feature(**options)) == field


def test_schemas_that_contradict_themselves_are_refused() -> None:
    item = Feature("item", buckets=5, dim=2)
    other = Feature("item", buckets=6, dim=2)
    many = tuple(Feature(f"f{i}", kind="dense", width=1) for i in range(MAX_FEATURES + 1))
    assert _field(lambda: FeatureSchema((), (), (item,))) == "behaviour"
    assert _field(lambda: FeatureSchema((), (item,), ())) == "candidate"
    assert _field(lambda: FeatureSchema(many, (item,), (item,))) == "user"
    assert _field(lambda: FeatureSchema((), (item, item), (item,))) == "behaviour"
    assert _field(lambda: FeatureSchema((), (item,), (other,))) == "item"
    shared = FeatureSchema((), (item,), (Feature("shown", buckets=5, dim=2, table="item"),))
    assert shared.tables == {"item": (5, 2)}


def test_behaviours_from_columns() -> None:
    rows = SCHEMA.behaviours({"time_ms": [5, 5, 9], "item": [1, -2, 2**63 - 1], "dwell": [0.5, 1, 2]})
    assert rows.dtype == SCHEMA.behaviour_dtype
    assert rows["item"].tolist() == [1, -2, 2**63 - 1]
    assert rows["dwell"].tolist() == [[0.5], [1.0], [2.0]]
    assert SCHEMA.behaviours({"time_ms": [7]})["item"].tolist() == [0]
    assert len(SCHEMA.behaviours({"time_ms": []})) == 0


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"item": [1]}, "behaviours.time_ms"),
        ({"time_ms": [1], "colour": [1]}, "behaviours.colour"),
        ({"time_ms": [1, 2], "item": [1]}, "behaviours.item"),
        ({"time_ms": [1], "item": [1.5]}, "behaviours.item"),
        ({"time_ms": [1], "item": ["shoe"]}, "behaviours.item"),
        ({"time_ms": [1], "item": [2**63]}, "behaviours.item"),
        ({"time_ms": [1], "item": [2**70]}, "behaviours.item"),
        ({"time_ms": [1], "dwell": [float("nan")]}, "behaviours.dwell"),
        ({"time_ms": [1], "dwell": [float("inf")]}, "behaviours.dwell"),
        ({"time_ms": [1], "dwell": [[1, 2]]}, "behaviours.dwell"),
        ({"time_ms": [1], "dwell": "x"}, "behaviours.dwell"),
        ({"time_ms": [5, 4]}, "behaviours[1].time_ms"),
        ({"time_ms": [-1]}, "behaviours[0].time_ms"),
    ],
)
def test_broken_columns_are_refused_by_name(columns: dict[str, Any], field: str) -> None:
    assert _field(lambda: SCHEMA.behaviours(columns)) == field


def test_behaviours_that_follow_others() -> None:
    rows = SCHEMA.behaviours({"time_ms": [5, 9]})
    assert SCHEMA.check_behaviours(rows, 5) is rows
    assert _field(lambda: SCHEMA.check_behaviours(rows, 6)) == "behaviours[0].time_ms"
    assert _field(lambda: SCHEMA.check_behaviours(rows[:, None])) == "behaviours"
    assert _field(lambda: SCHEMA.check_behaviours(np.zeros(2), field="history")) == "history"


def test_candidates_from_columns_and_context() -> None:
    rows = SCHEMA.candidates({"item": [1, 2], "affinity": [[1, 2], [3, 4]]}, {"surface": 3})
    assert rows["time_ms"].tolist() == [-1, -1]
    assert rows["surface"].tolist() == [3, 3]
    assert rows["affinity"].tolist() == [[1, 2], [3, 4]]
    assert SCHEMA.candidates({"item": [1], "affinity": [5, 6]})["affinity"].tolist() == [[5, 6]]
    assert SCHEMA.candidates({"item": [1], "time_ms": [0]})["time_ms"].tolist() == [0]
    assert _field(lambda: SCHEMA.candidates({"item": [1], "time_ms": [-2]})) == "candidates.time_ms"
    assert _field(lambda: SCHEMA.candidates({"item": [1]}, {"item": 3})) == "context.item"
    assert _field(lambda: SCHEMA.candidates({"item": [1]}, {"surface": "home"})) == "context.surface"


def test_user_rows() -> None:
    row = SCHEMA.user_row({"segment": 7, "activity": [1.0, 2.0]})
    assert (row["segment"].tolist(), row["activity"].tolist()) == ([7], [[1.0, 2.0]])
    assert _field(lambda: SCHEMA.user_row({"age": 7})) == "features.age"
    assert _field(lambda: SCHEMA.user_row({"activity": [1.0]})) == "features.activity"


def test_a_schema_travels_as_json() -> None:
    assert FeatureSchema.from_json(SCHEMA.to_json()) == SCHEMA
    for text in ("", "[]", "{}", '{"user": [{"nam": "x"}], "behaviour": [], "candidate": []}', "null"):
        assert _field(lambda text=text: FeatureSchema.from_json(text)) == "schema"
