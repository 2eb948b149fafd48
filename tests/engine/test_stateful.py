"""Random walks over everything an engine is asked to do, with tiny tiers: each answer equals a full recompute.

The answer is held against the history as it stood when the request was submitted, whatever was
appended, corrected, evicted, cancelled, failed or replaced before its batch ran.
"""

from __future__ import annotations

import os

import pytest
from engine_world import DelayedMover, Pending, World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_models import CAUSAL, make_features, small_model

from mtserve._core import policy_names
from mtserve.errors import NotFound, TransferFailed
from mtserve.restore.costs import Costs, costs_for_cpu
from mtserve.transfer.chaos import Chaos
from mtserve.transfer.slow_mover import SlowMover

USERS = st.sampled_from("abcd")
COUNTS = st.integers(1, 12)
SMALL = {"layers": 3, "d": 32, "heads": 1, "head_dim": 8, "max_history": 24, "max_realtime": 6}
MODELS = {
    "full-static": [small_model(seed, **SMALL) for seed in (0, 1)],
    "causal": [small_model(seed, **SMALL, **CAUSAL) for seed in (0, 1)],
}
TOLERANCES = {
    ("native", "kv"): 1e-5, ("native", "kv8"): 0.05, ("native", "x8"): 0.05, ("native", "x4"): 0.3, ("fp8", "kv"): 0.05,
}  # fmt: skip
FORMATS = [("native", "kv"), ("native", "kv"), *TOLERANCES]  # of the device and of the host
# A load of a few layers takes about as long as they take to encode: batches choose now one way, now another.
EVEN = Costs(
    link=((1, 5e7), (4096, 2e8)), load_s=2e-6, batch_s=0.0, layer_s=1e-6, row_s=1e-6, pair_s=2e-8, unpack_s=1e-8
)
COSTS = {"none": None, "free": costs_for_cpu(), "even": EVEN}


class EngineMachine(RuleBasedStateMachine):
    """The rules shared by both kinds of model."""

    models = MODELS["full-static"]

    def __init__(self) -> None:
        super().__init__()
        self.failing = self.copies = 0
        self.delayed = False
        self.pending: list[Pending] = []
        self.pinned: set[str] = set()

    @initialize(
        gpu_pages=st.sampled_from([2, 7, 12, 16]),
        host_pages=st.sampled_from([0, 2, 9, 30]),
        page_tokens=st.sampled_from([1, 3, 4]),
        late=st.booleans(),
        overlap=st.sampled_from(["no", "early", "late"]),
        batch=st.sampled_from([7, 20, 1000]),
        idle_ms=st.sampled_from([0, 40]),
        slow=st.sampled_from([0.0, 0.0, 0.4]),
        near_loads=st.booleans(),
        formats=st.sampled_from(FORMATS),
        policy=st.sampled_from(policy_names()),
        costs=st.sampled_from([*COSTS]),
        restore=st.sampled_from(["auto", "auto", "load"]),
        pin_budget=st.sampled_from([0.0, 0.2, 0.5]),
        seed=st.integers(0, 999),
    )
    def start(
        self,
        gpu_pages: int,
        host_pages: int,
        page_tokens: int,
        late: bool,
        overlap: str,
        batch: int,
        idle_ms: int,
        slow: float,
        near_loads: bool,
        formats: tuple[str, str],
        policy: str,
        costs: str,
        restore: str,
        pin_budget: float,
        seed: int,
    ) -> None:
        gpu_format, host_format = formats
        self.world = World(
            self.models[0],
            gpu_pages=gpu_pages,
            host_pages=host_pages,
            page_tokens=page_tokens,
            seed=seed,
            gpu_format=gpu_format,
            host_format=host_format,
            policy=policy,
            tolerance=TOLERANCES[formats],
            costs=COSTS[costs],
            restore=restore,
            max_candidates=5,  # a batch has room for no more rows than max_batch_tokens or one user's alone
            max_batch_tokens=batch,
            cold_batch_tokens=max(1, batch // 2),
            cold_after=5,
            max_batch_requests=5,
            write_back_idle_ms=idle_ms,
            pin_budget=pin_budget,
        )
        if overlap != "no":
            self.world.overlap(late=overlap == "late")
        for count, user in enumerate("abcd"):
            self.world.put(user, 6 * count + 3)
        self.mover: DelayedMover = self.world.delay_copies(late, self._fault, near_loads)
        if slow:  # ended copies are told late, too
            chaos = Chaos(slow=slow, slow_s=0.03, seed=seed)
            self.world.use_mover(SlowMover(self.mover, chaos.delay, self.world.clock))

    def _fault(self, kind: str) -> None:
        self.copies += 1
        if self.failing and self.copies % self.failing == 0:
            raise TransferFailed(f"{kind}: switched off")

    # Histories

    @rule(user=USERS, count=st.integers(1, 4), prefetch=st.booleans())
    def append(self, user: str, count: int, prefetch: bool) -> None:
        self.world.append(user, count, prefetch)

    @rule(user=USERS, kind=st.sampled_from(["correct", "correct", "features", "history", "delete"]), count=COUNTS)
    def change(self, user: str, kind: str, count: int) -> None:
        """What invalidates states: other behaviours in place of the last ones, other U features, a new user."""
        if kind == "history":
            self.world.put(user, 2 * count, features=count % 2 == 0)
        elif kind == "delete":
            self.world.delete(user)
            self.pinned.discard(user)
        elif kind == "features":
            self.world.put_rows(user, None, make_features(self.world.rng))
        elif user in self.world.rows:
            first = self.world.engine.history.read(user).first
            self.world.truncate(user, max(first, len(self.world.rows[user]) - count))
            self.world.append(user, count // 2)

    # Requests

    @rule(user=USERS, count=st.integers(1, 5), back_ms=st.sampled_from([-1, -1, 0, 300, 40_000, 10_000_000]))
    def submit(self, user: str, count: int, back_ms: int) -> None:
        if user not in self.world.rows:
            with pytest.raises(NotFound):
                self.world.engine.prefetch(user)
            return
        rows = self.world.rows[user]
        exposed = int(rows["time_ms"][-1]) - back_ms if back_ms >= 0 and len(rows) else -1
        self.pending.append(self.world.submit(user, candidates=self.world.candidates(count, exposed)))

    @rule(users=st.lists(USERS, min_size=2, max_size=6))
    def submit_several(self, users: list[str]) -> None:
        for user in users:
            if user in self.world.rows:
                self.pending.append(self.world.submit(user, 2))
        self.step(1)

    @rule(user=USERS, count=st.integers(1, 3), prefetch=st.booleans())
    def append_and_score(self, user: str, count: int, prefetch: bool) -> None:
        """What a recommender does all day."""
        self.world.append(user, count, prefetch)
        self.pending.append(self.world.submit(user, 3))
        self.step(1)

    @rule(user=USERS, keep=st.integers(0, 30))
    def submit_stateless(self, user: str, keep: int) -> None:
        """A caller's own history: perhaps an old one, perhaps the present one."""
        if user in self.world.rows:
            history = self.world.history_of(user)
            sent = type(history)(history.features, history.first, history.behaviours[:keep])
            self.pending.append(self.world.submit(user, 2, history=sent))

    @rule(user=USERS)
    def prefetch(self, user: str) -> None:
        if user in self.world.rows:
            self.world.engine.prefetch(user)

    @precondition(lambda self: self.pending)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        self.pending.pop(which % len(self.pending)).future.cancel()

    @rule(users=st.lists(st.sampled_from("abcde"), max_size=3), pin=st.booleans())
    def pin_or_unpin(self, users: list[str], pin: bool) -> None:
        was = len(self.pinned)
        changed = (self.world.engine.pin if pin else self.world.engine.unpin)(users)
        self.pinned = self.pinned | set(users) if pin else self.pinned - set(users)
        assert changed == abs(len(self.pinned) - was)
        assert self.world.tiers.index.stats().pinned == len(self.pinned)

    # The engine

    @rule(steps=st.integers(1, 3))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.engine.step()
            self.world.engine.check()

    @rule(ms=st.sampled_from([5, 30, 41]))
    def pass_time(self, ms: int) -> None:
        self.world.clock.now += ms / 1000

    @rule()
    def settle(self) -> None:
        """Let every copy end and every request be answered."""
        for _ in range(2000):
            self.mover.release_all()
            if not self.world.step() and not self.world.engine._core.busy() and not self.world.tiers.mover.pending():
                break
            self.world.clock.now += 0.01
        assert all(pending.future.done() for pending in self.pending)
        assert not self.world.engine._core.busy()

    @rule(which=st.integers(0, 100))
    def end_copy(self, which: int) -> None:
        if self.mover.jobs:
            self.mover.release(which % len(self.mover.jobs))

    @rule(
        delayed=st.booleans(),
        failing=st.sampled_from([0, 0, 0, 1, 2, 3]),
        dear=st.sampled_from([0, 0, 0, 1e-5, 9]),
        batch_s=st.sampled_from([0, 0, 3e-5, 9]),
    )
    def switch_copies(self, delayed: bool, failing: int, dear: float, batch_s: float) -> None:
        """Hold copies back or not; make none, or each first, second or third one fail; expect loads, or batches, to take
        long.
        """
        self.delayed, self.failing, self.mover.load_seconds = delayed, failing, dear
        self.world.pace(1e-6 if dear or batch_s else 0.0, batch_s)

    @precondition(lambda self: self.world.tiers.restoring is not None)
    @rule(layer=st.sampled_from([0, 1, 1, 2, 2, 3, None]))
    def restore_at(self, layer: int | None) -> None:
        """The first of the layers that batches load; None: they decide."""
        self.world.restore_at(layer)

    @rule(user=st.one_of(USERS, USERS, USERS, st.none()), replace=st.booleans())
    def forget_states(self, user: str | None, replace: bool) -> None:
        """Drop what is cached of a user or of all; or serve other weights, or the first ones again."""
        if user is not None or not replace:
            self.world.engine.invalidate(user)
        else:
            self.world.engine._core.batches.land()  # what is under way is answered by the old weights
            self._answered()
            self.world.replace(self.models[1] if self.world.truth is self.models[0] else self.models[0])

    @invariant()
    def answers_equal_recompute(self) -> None:
        if hasattr(self, "world"):
            if not self.delayed:
                self.mover.release_all()
            self._answered()
            self.world.engine.check()

    def _answered(self) -> None:
        for pending in [pending for pending in self.pending if pending.future.done()]:
            pending.verify()
            self.pending.remove(pending)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.settle()
            self._answered()
            self.world.assert_empty()
            self.world.engine.close()


class CausalMachine(EngineMachine):
    models = MODELS["causal"]


CI = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci"
LIMITS = settings(max_examples=60, stateful_step_count=50) if CI else settings()
TestFullStatic = EngineMachine.TestCase
TestFullStatic.settings = LIMITS
TestCausal = CausalMachine.TestCase
TestCausal.settings = LIMITS
