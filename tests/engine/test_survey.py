"""What the tiers know of the waiting jobs is asked once a step, and again when a load changes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_world import World

Make = Callable[..., World]


def test_a_load_that_ends_while_others_start_is_used_in_the_same_step(world: Make) -> None:
    w = world(gpu_pages=12)
    w.put("a", 21)
    w.score("a")
    w.evict_from_gpu()
    mover = w.delay_copies()
    pending = w.submit("a")
    w.step()
    assert mover.submitted == ["load"]
    poll = mover.poll

    def poll_and_end() -> Any:
        ended = poll()
        mover.release_all()  # told by the poll after this one
        return ended

    mover.poll = poll_and_end  # type: ignore[method-assign]
    w.step()
    result = pending.verify()
    assert (result.gpu_tokens, result.host_tokens) == (4, 19)
    w.run()
    w.assert_empty()


def test_a_step_asks_once_for_all_that_waits(world: Make) -> None:
    w = world()
    for user in "abcdef":
        w.put(user, 5)
        w.score(user)
    asked: list[list[str]] = []
    survey = w.tiers.index.survey
    w.tiers.index.survey = lambda users, chains: asked.append(users) or survey(users, chains)
    pending = [w.submit(user) for user in "abcdefa"]
    w.step()
    assert asked == [list("abcdefa")]
    assert [each.verify().gpu_tokens for each in pending] == [7] * 7
