"""Which users' states the device is to hold: scores first, prefetches in what these leave."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
from small_models import SCHEMA, make_behaviours, make_candidates, small_config

from mtserve.engine.queue.scheduler import PATIENCE
from mtserve.engine.queue.window import OVERTAKEN, in_turn, open_window
from mtserve.engine.request.job import Job, make_job
from mtserve.engine.request.sequence import SequenceBuilder
from mtserve.types import History

BUILDER = SequenceBuilder(small_config(), SCHEMA, "weights")
PAGE_TOKENS = 4


def score(user: str, pages: int, candidates: int = 2) -> Job:
    """A request whose prefix takes `pages` pages, the last of them half."""
    rng = np.random.default_rng(0)
    behaviours = make_behaviours(rng, pages * PAGE_TOKENS - 2 - len(SCHEMA.user))
    sequence = BUILDER.build(user, History(None, 0, behaviours))
    return make_job(sequence, make_candidates(rng, candidates), Future(), 100.0, None)


def hint(user: str, pages: int) -> Job:
    return score(user, pages, candidates=0)


def window(pages: int, *jobs: Job, idle: bool = True, wait_for_copies: bool = False, **held: int) -> dict[str, int]:
    return open_window(jobs, pages, PAGE_TOKENS, held, idle=idle, wait_for_copies=wait_for_copies)


def test_the_first_users_that_fit_together_are_let_in() -> None:
    jobs = [score("a", 2), score("b", 3), score("a", 2), score("c", 2), score("d", 1)]
    assert window(7, *jobs) == {"a": 2, "b": 3, "c": 2}
    assert window(6, *jobs) == {"a": 2, "b": 3}  # nobody overtakes c
    assert list(window(8, *jobs)) == list("abcd")


def test_a_user_larger_than_all_there_is_waits_until_nothing_runs() -> None:
    assert window(2, score("a", 3), score("b", 1)) == {"a": 3}
    assert window(2, score("a", 3), score("b", 1), idle=False) == {}
    assert window(2, hint("a", 3)) == {"a": 3}


def test_a_user_has_what_its_longest_history_let_in_takes() -> None:
    assert window(5, score("a", 2), score("a", 4), score("b", 1)) == {"a": 4, "b": 1}
    assert window(3, score("a", 2), score("a", 4), score("b", 1)) == {"a": 2}
    assert window(4, score("a", 4), score("a", 2)) == {"a": 4}


def test_prefetches_leave_alone_what_copies_of_others_hold() -> None:
    jobs = [score("a", 2), hint("b", 2)]
    assert window(6, *jobs, x=2) == {"a": 2, "b": 2}
    assert window(5, *jobs, x=2) == {"a": 2}
    assert window(5, jobs[0], score("b", 2), x=2) == {"a": 2, "b": 2}  # scores never wait for copies


def test_what_a_copy_holds_of_users_let_in_is_counted_once() -> None:
    jobs = [score("a", 2), hint("b", 2), hint("c", 2)]
    assert window(6, *jobs, a=2, b=2, c=1) == {"a": 2, "b": 2, "c": 2}
    assert window(5, *jobs, a=2, b=2, c=1) == {"a": 2, "b": 2}
    assert window(4, score("b", 2), hint("b", 3), hint("c", 1), b=2) == {"b": 3, "c": 1}


def test_where_states_are_dear_nobody_is_let_in_over_what_copies_hold() -> None:
    jobs = [score("a", 4), score("b", 2), score("c", 3), score("d", 1)]
    assert window(8, *jobs, wait_for_copies=True, x=2) == {"a": 4, "b": 2}
    assert window(7, *jobs, wait_for_copies=True, x=2) == {"a": 4, "d": 1}  # who fits goes first
    assert window(7, *jobs, wait_for_copies=True, c=3) == {"a": 4, "c": 3}  # its own pages are its room
    assert window(4, *jobs, wait_for_copies=True, idle=False, x=1) == {"b": 2, "d": 1}
    assert window(2, jobs[0], wait_for_copies=True, x=1) == {"a": 4}  # nothing to wait for


def test_who_fits_goes_first_no_longer_than_the_limit() -> None:
    jobs = [score("a", 4), score("b", 3), score("c", 1)]
    jobs[1].overtaken = OVERTAKEN - 1
    assert window(5, *jobs, wait_for_copies=True) == {"a": 4, "c": 1}
    jobs[1].overtaken = OVERTAKEN
    assert window(5, *jobs, wait_for_copies=True) == {"a": 4}


def test_who_has_most_of_its_prefix_there_gets_room_first() -> None:
    jobs = [score("a", 4), score("b", 4), score("c", 2), score("d", 4)]
    held = {"b": 7, "c": 2, "d": 6}  # of 14, 14, 6 and 14 tokens
    assert in_turn(jobs, lambda job: held.get(job.user_id, 0)) == [jobs[1], jobs[0], jobs[2], jobs[3]]


def test_who_let_later_ones_go_first_for_long_comes_before_them() -> None:
    jobs = [score("a", 4), score("b", 4), score("c", 4)]
    jobs[2].overtaken = PATIENCE
    assert in_turn(jobs, lambda job: 14 if job is jobs[1] else 0) == [jobs[2], jobs[1], jobs[0]]
    jobs[2].overtaken -= 1
    assert in_turn(jobs, lambda job: 14 if job is jobs[1] else 0) == [jobs[1], jobs[0], jobs[2]]


def test_who_was_given_room_keeps_it_until_its_batch() -> None:
    jobs = [score("a", 4), score("b", 4), score("c", 4), score("d", 4)]
    jobs[0].overtaken, jobs[1].begun = PATIENCE, True
    jobs[2].loads = jobs[3].loads = 1
    held = {jobs[2]: 14}  # what was loaded for d was evicted again
    assert in_turn(jobs, lambda job: held.get(job, 0)) == [jobs[1], jobs[2], jobs[0], jobs[3]]


def test_prefetches_get_room_behind_every_score() -> None:
    jobs = [score("a", 4), hint("b", 4), hint("c", 4)]
    jobs[2].overtaken = PATIENCE
    assert in_turn(jobs, lambda job: 14 if job.user_id == "b" else 0) == [jobs[0], jobs[2], jobs[1]]
