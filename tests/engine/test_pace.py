"""The pace of recent batches: a lower bound, forgotten when it is old."""

from __future__ import annotations

import numpy as np

from mtserve.engine.pace import BELIEVED_S, SAMPLES, Pace


def test_nothing_is_known_at_first_nor_of_empty_batches() -> None:
    pace = Pace()
    assert pace.token_s(10.0) == 0
    pace.landed(10.0, 11.0, 0)
    assert pace.token_s(11.0) == 0


def test_overlapping_batches_count_from_the_landing_before() -> None:
    pace = Pace()
    pace.landed(0.0, 0.4, 10)
    assert pace.token_s(0.4) == 0.04
    pace.landed(0.1, 0.5, 10)
    assert np.isclose(pace.token_s(0.5), 0.01)


def test_the_best_of_the_recent_batches_counts() -> None:
    """Held against the definition: the minimum over the last SAMPLES batches of the last BELIEVED_S seconds."""
    rng, pace, now = np.random.default_rng(0), Pace(), 0.0
    samples: list[tuple[float, float]] = []
    for _ in range(600):
        began, now = now, now + float(rng.choice([0.001, 0.02, 0.3]) * rng.uniform(0.5, 1.5))
        tokens = int(rng.integers(0, 50))
        pace.landed(began, now, tokens)
        if tokens:
            samples.append((now, (now - began) / tokens))
        asked = now + float(rng.choice([0.0, 0.1, 2.0], p=[0.9, 0.09, 0.01]))
        recent = [rate for at, rate in samples[-SAMPLES:] if asked - at <= BELIEVED_S]
        assert pace.token_s(asked) == min(recent, default=0.0)
        now = asked
        pace.landed(now, now, 0)
