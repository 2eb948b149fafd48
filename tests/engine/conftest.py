"""Worlds as fixtures: each checked, and closed, at the end of its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_world import World


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    """Makes worlds; at the end each engine is checked and closed."""
    made: list[World] = []

    def make(*args: Any, **options: Any) -> World:
        made.append(World(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.check()
        each.engine.close()
