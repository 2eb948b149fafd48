"""How far predictions were off, over a bounded window."""

from __future__ import annotations

import logging
import math

import pytest

from mtserve.restore.watch import PredictionWatch


def test_nothing_is_said_of_nothing() -> None:
    watch = PredictionWatch()
    watch.note(1.0, 0.0, "load")
    assert watch.error() is None
    assert watch.stats() == {"batches": 0, "by_way": {}, "error": None, "actual_over_predicted": None}


def test_the_median_counts() -> None:
    watch = PredictionWatch()
    for predicted_s, actual_s in ((1.0, 2.0), (3.0, 2.0), (2.0, 2.0), (100.0, 1.0), (0.9, 1.0)):
        watch.note(predicted_s, actual_s, "split")
    assert watch.error() == 0.5  # of 0.5, 0.5, 0, 99 and 0.1
    stats = watch.stats()
    assert (stats["batches"], stats["by_way"]) == (5, {"split": 5})
    assert math.isclose(stats["actual_over_predicted"], 1.0)


def test_what_was_predicted_to_take_nothing_has_no_quotient() -> None:
    watch = PredictionWatch()
    watch.note(0.0, 2.0, "load")
    assert (watch.error(), watch.stats()["actual_over_predicted"]) == (1.0, None)


def test_the_window_is_bounded() -> None:
    watch = PredictionWatch(window=3)
    for way, actual_s in (("load", 8.0), ("load", 8.0), ("split", 1.0), ("recompute", 1.0), ("split", 1.0)):
        watch.note(1.0, actual_s, way)
    assert watch.error() == 0.0
    assert watch.stats()["by_way"] == {"split": 2, "recompute": 1}


def test_each_batch_is_logged_for_those_who_look(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="mtserve.restore.watch"):
        PredictionWatch().note(0.001, 0.002, "split")
    assert [record.message for record in caplog.records] == ["split: predicted 1.000 ms, took 2.000 ms, off by 50%"]


def test_a_way_is_not_judged_by_its_first_batch_for_ever() -> None:
    """It compiled; nobody takes that way again, so that nothing of its own would ever correct it."""
    watch = PredictionWatch(window=8)
    watch.note(1.0, 1.0, "recompute")
    watch.note(1.0, 500.0, "split")
    for _ in range(7):
        watch.note(1.0, 1.0, "recompute")
        assert watch.offsets["split"] == 499.0
    watch.note(1.0, 1.0, "recompute")
    assert watch.offsets == {"load": 0.0, "split": 0.0, "recompute": 0.0}
