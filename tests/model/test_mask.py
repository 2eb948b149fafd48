"""Visibility drawn as pictures: from the definition in words, and from the one integer a row that kernels use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve.model.mask import Groups, candidate_limits, visibility, visible, visible_limits

GROUPS = Groups(user=1, static=2, realtime=3)
REALTIME_MS = np.array([100, 200, 200])
EXPOSURES = np.array([100, 200, 201, 150, 50])  # see 0, 1, 3, 1 and 0 of R
FULL = """
U    xxx........
S    xxx........
S    xxx........
R    xxxx.......
R    xxxxx......
R    xxxxxx.....
C0   xxx...x....
C1   xxxx...x...
C3   xxxxxx..x..
C1   xxxx.....x.
C0   xxx.......x
"""
CAUSAL = """
U    x..........
S    xx.........
S    xxx........
R    xxxx.......
R    xxxxx......
R    xxxxxx.....
C0   xxx...x....
C1   xxxx...x...
C3   xxxxxx..x..
C1   xxxx.....x.
C0   xxx.......x
"""


def _draw(rows: list[list[bool]], names: list[str]) -> str:
    lines = [f"{name:5}" + "".join(".x"[int(cell)] for cell in row) for name, row in zip(names, rows, strict=True)]
    return "\n" + "\n".join(lines) + "\n"


def _from_words(groups: Groups, mode: str, seen: list[int]) -> list[list[bool]]:
    total = groups.prefix + len(seen)
    return [
        [
            visible(groups, mode, i, j, seen[i - groups.prefix] if i >= groups.prefix else None)
            for j in range(total)
        ]
        for i in range(total)
    ]  # fmt: skip


def _from_limits(groups: Groups, mode: str, realtime_ms: np.ndarray, exposures: np.ndarray) -> list[list[bool]]:  # type: ignore[type-arg]
    limits = [*visible_limits(groups, mode, 0, groups.prefix), *candidate_limits(groups, realtime_ms, exposures)]
    return [
        [j < limit or (j == i and i >= groups.prefix) for j in range(len(limits))] for i, limit in enumerate(limits)
    ]


@pytest.mark.parametrize(("mode", "picture"), [("full", FULL), ("causal", CAUSAL)])
def test_the_mask_is_this_picture(mode: str, picture: str) -> None:
    names = ["U", "S", "S", "R", "R", "R", "C0", "C1", "C3", "C1", "C0"]
    assert _draw(_from_words(GROUPS, mode, [0, 1, 3, 1, 0]), names) == picture
    assert _draw(_from_limits(GROUPS, mode, REALTIME_MS, EXPOSURES), names) == picture


@given(
    user=st.integers(0, 3), static=st.integers(0, 5), times=st.lists(st.integers(0, 9), max_size=6).map(sorted),
    exposures=st.lists(st.integers(0, 11), max_size=4), mode=st.sampled_from(["full", "causal"]), data=st.data(),
)  # fmt: skip
def test_limits_say_what_the_words_say(
    user: int, static: int, times: list[int], exposures: list[int], mode: str, data: st.DataObject
) -> None:
    groups = Groups(user, static, len(times))
    seen = [sum(time < exposure for time in times) for exposure in exposures]
    drawn = _from_limits(groups, mode, np.array(times, np.int64), np.array(exposures, np.int64))
    assert drawn == _from_words(groups, mode, seen)
    first = data.draw(st.integers(0, groups.prefix))
    last = data.draw(st.integers(first, groups.prefix))
    whole = visible_limits(groups, mode, 0, groups.prefix)
    assert visible_limits(groups, mode, first, last).tolist() == whole[first:last].tolist()


@pytest.mark.parametrize("mode", ["full", "causal"])
@pytest.mark.parametrize("groups", [GROUPS, Groups(0, 0, 0), Groups(3, 0, 2), Groups(0, 5, 0), Groups(2, 7, 0)])
def test_the_array_is_the_definition(mode: str, groups: Groups) -> None:
    seen = [min(groups.realtime, count) for count in (0, 2, 1, 9)]
    assert visibility(groups, mode, np.array(seen)).tolist() == _from_words(groups, mode, seen)


def test_lengths_sum() -> None:
    assert (GROUPS.frozen, GROUPS.prefix) == (3, 6)
