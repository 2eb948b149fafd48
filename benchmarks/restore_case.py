"""One shape of a restore benchmark: two groups of users who take turns on a device that holds one of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtserve import Engine, EngineConfig  # noqa: E402
from mtserve.engine.setup import DTYPES, page_shape  # noqa: E402
from mtserve.engine.tiers.footprint import Footprint, packed_format  # noqa: E402
from mtserve.model.presets import default_schema, preset  # noqa: E402
from mtserve.model.ranking import RankingModel  # noqa: E402
from mtserve.model.weights import initialise  # noqa: E402
from mtserve.types import Request, Rows, ScoreResult  # noqa: E402

SEED = 7


@dataclass(frozen=True)
class Case:
    """`users` users with `history` behaviours on the host; a request brings `new` more and `candidates` candidates.

    `reach_ms`: what is to be reached with each format.
    """

    model: str
    users: int
    history: int
    format: str
    new: int = 128
    candidates: int = 256
    reach_ms: float | None = None
    reach_share: float | None = None  # of recomputing

    @property
    def name(self) -> str:
        return f"{self.model} B{self.users} L{self.history} {self.format}"


@dataclass(frozen=True)
class Turn:
    """One batch: seconds from the first look at its queue to its answers, and `laps`, milliseconds of the loop's parts."""

    seconds: float
    requests: list[Request]
    results: list[ScoreResult]
    laps: dict[str, float]


class Turns:
    """An engine driven by hand, in which each batch asks for users whose states only the host has.

    `began`: when the last batch's queue was looked at first, by `time.perf_counter`.
    """

    began = 0.0

    def __init__(self, case: Case) -> None:
        model = make_model(case)
        self.case, self._schema = case, model.schema
        self._rng = np.random.default_rng(SEED)
        self.groups = [[f"{group}-{user}" for user in range(case.users)] for group in "ab"]
        self.engine = Engine(model, engine_config(case, model), start=False)
        for user in (user for group in self.groups for user in group):
            self.engine.put_user(user, history=self._behaviours(0, case.history))
        self.restoring = self.engine._core.tiers.restoring  # type: ignore[union-attr]
        self._turn = 0
        for _ in range(2):
            self.restore("recompute")

    def _behaviours(self, first: int, count: int) -> Rows:
        items, times = self._rng.integers(0, 10**6, count), (first + np.arange(count)) * 1000
        return self._schema.behaviours({"time_ms": times, "item": items})

    def _requests(self, users: Sequence[str]) -> list[Request]:
        items = self._rng.integers(0, 10**6, self.case.candidates)
        return [Request(user, self._schema.candidates({"item": items})) for user in users]

    def prepare(self, way: str) -> list[Request]:
        """What a batch of the group that the device does not hold asks, with new behaviours; it is to restore by `way`."""
        self.restoring.way = way
        users = self.groups[self._turn % 2]
        self._turn += 1
        for user in users:
            self.engine.truncate(user, self.case.history)
            self.engine.append(user, self._behaviours(self.case.history, self.case.new))
            self.engine._sequences.get(user)  # as it is there where histories grow
        return self._requests(users)

    def restore(self, way: str) -> Turn:
        """A batch of the group that the device does not hold."""
        requests = self.prepare(way)
        before = self.engine.stats()["loop_seconds"]
        seconds, results = self.ask(requests)
        after = self.engine.stats()["loop_seconds"]
        laps = {name: 1e3 * (after[name] - before[name]) for name in after if after[name] > before[name]}
        return Turn(seconds, requests, results, laps)

    def error(self, turn: Turn) -> float:
        """Relative L2 of a batch's logits against those of the same engine when it has forgotten everything."""
        self.engine.invalidate()
        _, again = self.ask(turn.requests)
        left, right = (np.concatenate([each.logits for each in results]) for results in (turn.results, again))
        self.restore("recompute")  # the other group's states are gone as well
        return float(np.linalg.norm(left - right) / np.linalg.norm(right))

    def ask(self, requests: Sequence[Request]) -> tuple[float, list[ScoreResult]]:
        futures, answered = [self.engine.submit(request) for request in requests], []
        for future in futures:
            future.add_done_callback(lambda _: answered.append(time.perf_counter()))
        self.began = began = time.perf_counter()
        while len(answered) < len(futures):
            self.engine.step()
        seconds = max(answered) - began
        while self.engine._core.busy():  # write-backs
            self.engine.step()
        return seconds, [future.result() for future in futures]

    def close(self) -> None:
        self.engine.close()


def engine_config(case: Case, model: RankingModel) -> EngineConfig:
    """The device holds one group, the host both; one batch holds all users of a group, encoded whole."""
    rows = case.users * (case.history + case.new + case.candidates + len(model.schema.user))
    base = EngineConfig(
        host_format=case.format, host_pinning="wait", write_back_idle_ms=0, write_back_queue="64GiB",
        max_batch_requests=case.users, max_batch_tokens=rows, cold_batch_tokens=rows, cold_after=rows,
        max_candidates=case.candidates, graphs="on",
    )  # fmt: skip
    states = page_shape(model.config, base, DTYPES["bfloat16"])
    page = Footprint.of(states, packed_format(model.config, base, states))
    pages = case.users * -(-(case.history + case.new + len(model.schema.user)) // base.page_tokens)
    return replace(base, gpu_cache=str(pages * page.gpu), host_cache=str((2 * pages + 64) * page.host))


def make_model(case: Case) -> RankingModel:
    """Untrained, with room for the case's histories."""
    config = preset(case.model)
    longest = case.history + case.new
    if longest > config.max_history:
        config = replace(config, max_history=longest, max_realtime=longest)
    return initialise(RankingModel(config, default_schema()), SEED)
