"""The pace of recent batches: a lower bound, forgotten when it is old; and what they took by their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from mtserve.engine.queue.pace import BELIEVED_S, LINE_SAMPLES, SAMPLES, Line, Pace


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


def line_through(seconds: Callable[[int], float], sizes: Iterable[int]) -> Line:
    pace, now = Pace(), 0.0
    for tokens in sizes:
        began, now = now, now + seconds(tokens)
        pace.landed(began, now, tokens)
    return pace.line()


def test_the_line_follows_batches_an_eighth_of_its_own_number_late() -> None:
    pace, now = Pace(), 0.0

    def land(count: int, scale: float) -> None:
        nonlocal now
        for tokens in range(100, 100 + 10 * count, 10):
            began, now = now, now + scale * (0.5 + 0.001 * tokens)
            pace.landed(began, now, tokens)

    land(LINE_SAMPLES, 1.0)
    assert np.isclose(pace.line().batch_s, 0.5)
    land(LINE_SAMPLES // 8 - 1, 1000.0)
    assert np.isclose(pace.line().batch_s, 0.5)
    land(LINE_SAMPLES, 2.0)
    assert np.isclose(pace.line().batch_s, 1.0)


def test_what_a_batch_takes_however_small_is_told_from_batches_of_different_sizes() -> None:
    sizes = [*range(100, 400, 10)]
    batch_s, token_s, known_tokens = line_through(lambda tokens: 0.5 + 0.001 * tokens, sizes)
    assert np.isclose(batch_s, 0.5)
    assert np.isclose(token_s, 0.001)
    assert known_tokens == 345  # the middle of the ten largest


def test_a_few_batches_that_took_far_longer_move_the_line_little() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 1000, LINE_SAMPLES).tolist()
    slow = dict.fromkeys(sizes[::8], 5.0)
    batch_s, token_s, _ = line_through(lambda tokens: slow.get(tokens, 0.5 + 0.001 * tokens), sizes)
    assert 0.4 < batch_s < 0.6
    assert 0.0008 < token_s < 0.0012


@pytest.mark.parametrize("sizes", [[], [7], range(10, 90, 10), [50] * 20])
def test_no_line_goes_through_few_batches_or_batches_all_alike(sizes: Iterable[int]) -> None:
    assert line_through(lambda tokens: 0.5, sizes) == Line()


def test_a_line_neither_falls_nor_begins_below_nothing() -> None:
    assert line_through(lambda tokens: 1.0 - 0.001 * tokens, range(10, 200, 10)).token_s == 0
    assert line_through(lambda tokens: max(0.0, 0.001 * tokens - 0.5), range(10, 900, 10)).batch_s == 0


def test_the_line_is_that_of_the_latest_batches() -> None:
    sizes = [*range(10, 10 + LINE_SAMPLES)]
    assert np.isclose(line_through(lambda tokens: 0.2 if tokens < 1000 else 0.7, [*sizes, *range(1000, 1128)])[0], 0.7)
