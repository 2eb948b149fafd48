"""The engine and the kernels on CUDA, held to the same truth as on the CPU.

The contract in bf16: the relative L2 error of the logits against a full fp32 recompute is at most
1.2 times what the engine without a cache has, over the same histories and many candidates.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import Pending, World
from gpu_delays import MS, delay_groups, delay_stream, delay_submissions, group_all_loads
from kernel_plans import Shape, make_batch
from small_models import CAUSAL, START_MS, make_behaviours, make_candidates, small_model

from mtserve.cache.index import Copy
from mtserve.kernels.backend import load_kernels
from mtserve.model.ranking import RankingModel
from mtserve.transfer.arena import HostArena
from mtserve.transfer.mover import LOAD, STORE, Finished, Mover
from mtserve.transfer.pinning import CudaPinning
from mtserve.types import Request

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
EAGER, REFERENCE = load_kernels("eager"), load_kernels("reference")
# Relative to the largest value. fp32 products must not be rounded to TF32, which would show as 1e-3.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in BOUNDS]
SHAPES = [Shape(17, 5, 3), Shape(0, 9, 0), Shape(23, 0, 4), Shape(5, 1, 1), Shape(0, 0, 2), Shape(150, 300, 40)]
MTGR: dict[str, Any] = {
    "layers": 4, "d": 256, "heads": 2, "head_dim": 256,
    "max_history": 300, "max_realtime": 50, "attention_length": 256,
}  # fmt: skip

Make = Callable[..., World]


@pytest.fixture
def world() -> Iterator[Make]:
    made: list[World] = []

    def make(*args: Any, **options: Any) -> World:
        made.append(World(*args, **{"device": DEVICE, **options}))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()
        each.engine.check()


def _assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.device.type == DEVICE
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    largest = max(1.0, float(expected.abs().max()))
    assert float((got.float().cpu() - expected.float().cpu()).abs().max()) <= BOUNDS[dtype] * largest


# Kernels


@pytest.mark.parametrize("dtype", BOUNDS, ids=DTYPE_IDS)
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize(("page_tokens", "mask"), [(1, "causal"), (16, "full"), (64, "random")])
def test_attention_on_cuda_equals_the_reference(dtype: torch.dtype, head_dim: int, page_tokens: int, mask: str) -> None:
    batch = make_batch(
        SHAPES, mask=mask, page_tokens=page_tokens, heads=2, head_dim=head_dim, seed=7, dtype=dtype, device=DEVICE
    )
    expected = REFERENCE.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, 7)
    _assert_close(EAGER.attention(batch.q, batch.k, batch.v, batch.pages, batch.plan, 7), expected, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=DTYPE_IDS)
@pytest.mark.parametrize("gate_first", [False, True])
def test_the_other_kernels_on_cuda_equal_their_references(dtype: torch.dtype, gate_first: bool) -> None:
    generator = torch.Generator().manual_seed(8)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x, u, weight, bias = random(300, 512), random(300, 512), random(4, 512), random(4, 512)
    group = torch.randint(0, 4, (300,), generator=generator).to(DEVICE)
    _assert_close(
        EAGER.group_layer_norm(x, weight, bias, group), REFERENCE.group_layer_norm(x, weight, bias, group), dtype
    )
    gated = EAGER.norm_gate(x, u, weight, bias, group, gate_first)
    _assert_close(gated, REFERENCE.norm_gate(x, u, weight, bias, group, gate_first), dtype)
    projection = (x, random(512, 2048) / 512**0.5, random(2048))
    _assert_close(EAGER.projection_silu(*projection), REFERENCE.projection_silu(*projection), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=DTYPE_IDS)
def test_page_write_on_cuda_touches_its_rows_alone(dtype: torch.dtype) -> None:
    batch = make_batch(SHAPES, mask="causal", page_tokens=7, heads=2, head_dim=64, seed=9, dtype=dtype, device=DEVICE)
    expected, got = batch.pages.clone(), batch.pages.clone()
    REFERENCE.page_write(batch.k, batch.v, expected, batch.plan)
    EAGER.page_write(batch.k, batch.v, got, batch.plan)
    assert _bytes(got) == _bytes(expected)
    assert _bytes(got) != _bytes(batch.pages)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


# The engine


@pytest.mark.parametrize("changes", [{}, CAUSAL, {"gate_first": True}], ids=["full", "causal", "gate first"])
def test_in_fp32_cached_scores_equal_a_full_recompute(world: Make, changes: dict[str, Any]) -> None:
    w = world(small_model(**changes), gpu_pages=14, host_pages=30, page_tokens=3, tolerance=5e-5)
    for user in "abcd":
        w.put(user, 9)
    for _ in range(60):
        user = "abcd"[w.rng.integers(4)]
        w.append(user, int(w.rng.integers(3)))
        if w.rng.random() < 0.2:
            w.truncate(user, len(w.rows[user]) - 2)
            w.append(user, 2)
        pending = [w.submit(each, 3) for each in {user, "a"}]
        _finish(w)
        for each in pending:
            each.verify()
    assert w.value("loads_total") > 3


def _finish(w: World, limit: int = 2000) -> None:
    """Step until everything is answered and every copy has ended."""
    for _ in range(limit):
        w.engine.step()
        w.engine.check()
        if not w.engine._core.busy() and not w.engine._loop._inbox:
            return
        w.tiers.mover.wait()
    raise AssertionError(f"the engine was still busy after {limit} steps")


def _play(w: World, cached: bool) -> tuple[list[Pending], dict[str, float]]:
    """The same script for every engine: users that grow, are corrected, and push one another off the GPU."""
    pending: list[Pending] = []
    for index, user in enumerate("abcd"):
        w.put(user, 120 + 37 * index)
    for turn in range(14):
        user = "abcd"[turn * 3 % 4]
        w.append(user, 1 + turn % 5)
        if turn % 6 == 5:
            w.truncate(user, len(w.rows[user]) - 3)
            w.append(user, 3)
        exposures = START_MS * 2 + w.rng.integers(0, 10**8, 256)
        pending.append(w.submit(user, candidates=w.candidates(256, exposures)))
        if cached:
            _finish(w)
        else:
            w.run()
    tokens = {tier: w.value("prefix_tokens_total", tier) for tier in ("gpu", "host", "encoded")}
    return pending, tokens


def _error(pending: list[Pending], expected: list[np.ndarray]) -> float:  # type: ignore[type-arg]
    """Relative L2 of the logits of all requests together."""
    got = np.concatenate([each.future.result(0).logits for each in pending])
    truth = np.concatenate(expected)
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_in_bf16_the_cache_adds_no_error_to_speak_of(world: Make, changes: dict[str, Any]) -> None:
    model = small_model(2, **MTGR, **changes)
    size = {"page_tokens": 16, "dtype": "bfloat16", "seed": 4}
    uncached, _ = _play(world(model, cache="off", **size), cached=False)
    cached, tokens = _play(world(model, gpu_pages=30, host_pages=120, **size), cached=True)
    roomy, warm = _play(world(model, gpu_pages=120, host_pages=120, **size), cached=True)
    assert tokens["host"] > 300  # states went away and came back
    assert warm["gpu"] > 1000  # states stayed
    expected = [each.expected() for each in uncached]
    baseline = _error(uncached, expected)
    assert 1e-4 < baseline < 0.1  # bf16 rounds, and the comparison can see it
    for pending in (cached, roomy):
        assert all(
            np.array_equal(mine.candidates, other.candidates) for mine, other in zip(pending, uncached, strict=True)
        )
        assert _error(pending, expected) <= 1.2 * baseline + 1e-4


class ComparedCopies:
    """Compares the states that a copy brought when it is told as finished: nobody else may have touched them.

    What lies behind its tokens in the last page may be another's by then: a batch writes there meanwhile.
    """

    def __init__(self, mover: Mover, page_tokens: int) -> None:
        self.compared = {LOAD: 0, STORE: 0}
        self.open: dict[tuple[str, int], Copy] = {}
        self._mover, self._page_tokens = mover, page_tokens
        self._stream = torch.cuda.Stream()  # waits for none of what runs meanwhile
        self._submit, self._poll = mover.submit, mover.poll
        mover.submit, mover.poll = self._noted, self._checked  # type: ignore[method-assign]

    def _noted(self, kind: str, copies: Sequence[Copy]) -> None:
        self.open.update(((kind, copy.ticket), copy) for copy in copies)
        self._submit(kind, copies)

    def _checked(self) -> list[Finished]:
        finished = self._poll()
        for job in finished:
            copy = self.open.pop((job.kind, job.ticket))
            assert job.error is None
            assert _bytes(self._states(self._mover.pool, copy, copy.gpu_pages)) == _bytes(
                self._states(self._mover.arena, copy, copy.host_pages)
            )
            self.compared[job.kind] += 1
        return finished

    def _states(self, tier: torch.Tensor, copy: Copy, ids: Any) -> torch.Tensor:
        """[tokens, 2, layers, heads, head_dim]: those of tokens [first_token, tokens)."""
        with torch.cuda.stream(self._stream):
            pages = tier[torch.from_numpy(ids.astype(np.int64)).to(tier.device)].cpu()
        begin = copy.first_token // self._page_tokens * self._page_tokens
        return pages.transpose(1, 3).flatten(0, 1)[copy.first_token - begin : copy.tokens - begin]


def test_evict_and_reload_storms_keep_every_byte(world: Make) -> None:
    model = small_model(3, layers=8, d=64, heads=4, head_dim=128, max_history=200, max_realtime=20)
    w = world(model, gpu_pages=26, host_pages=90, page_tokens=16, dtype="bfloat16", tolerance=0.1)
    copies = ComparedCopies(w.tiers.mover, 16)
    for user in "abcdef":
        w.put(user, 90)
    for turn in range(120):
        user = "abcdef"[w.rng.integers(6)]
        w.append(user, int(w.rng.integers(2)))
        pending = w.submit(user, 2)
        _finish(w)
        if turn % 8 == 0:
            pending.verify()
        assert np.isfinite(pending.future.result(0).logits).all()
    assert copies.compared[LOAD] > 10
    assert copies.compared[STORE] > 20
    assert not copies.open
    w.assert_idle()
    w.assert_empty()


# Batches, loads and stores that overlap

# Four groups of one or two layers; a user of 600 tokens has 10 pages.
OVERLAPPED: dict[str, Any] = {
    "layers": 6, "d": 128, "heads": 2, "head_dim": 128,
    "max_history": 2000, "max_realtime": 600, "attention_length": 256,
}  # fmt: skip
SIZES: dict[str, Any] = {"page_tokens": 64, "dtype": "bfloat16", "kernels": "cuda", "restore": "load", "seed": 6}


def _live(w: World, waiting: int, corrections: bool = True) -> list[Pending]:
    """The same script for every engine; up to `waiting` requests are left open when the next ones come."""
    every: list[Pending] = []
    for index, user in enumerate("abcdef"):
        w.put(user, 200 + 50 * index)
    for turn in range(40):
        for user in w.rng.choice(list("abcdef"), 2, replace=False):
            w.append(user, int(w.rng.integers(0, 12)))
            if corrections and turn % 9 == 8:
                w.truncate(user, len(w.rows[user]) - 2)
            exposures = START_MS * 2 + w.rng.integers(0, 10**8, 64)
            every.append(w.submit(str(user), candidates=w.candidates(64, exposures)))
        _step_until(w, lambda: sum(not each.future.done() for each in every) <= waiting)
    _step_until(w, lambda: all(each.future.done() for each in every))
    return every


def _step_until(w: World, holds: Callable[[], bool]) -> None:
    """Step without waiting for any copy, so that batches, loads and stores run side by side."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        w.engine.step()
        w.engine.check()


def _errors(pending: list[Pending], truth: list[np.ndarray]) -> list[float]:  # type: ignore[type-arg]
    """Relative L2 of the logits of each request."""
    return [_error([each], [expected]) for each, expected in zip(pending, truth, strict=True)]


def _delayed(w: World) -> None:
    """Copies both ways and batches begin late at random, a load's last layers above all."""
    rng = np.random.default_rng(8)
    mover, runner = w.tiers.mover, w.engine._core.served.runner

    def cycles(*milliseconds: float) -> int:
        return int(rng.choice(milliseconds) * MS)

    delay_submissions(mover, lambda kind: cycles(0, 0, 0.3, 3))
    delay_groups(mover, lambda load, group: cycles(2, 8) if group == 3 else cycles(0, 0, 1))
    start = runner.start

    def late(*arguments: Any) -> Any:
        delay_stream(torch.cuda.current_stream(), cycles(0, 0.5, 4))
        return start(*arguments)

    runner.start = late


def _overlapping(world: Make, monkeypatch: pytest.MonkeyPatch, model: RankingModel, **options: Any) -> World:
    """An engine with delays everywhere, whose loads all come by groups and cross the ends of chunks of 16 pages."""
    group_all_loads(monkeypatch)
    monkeypatch.setattr("mtserve.engine.memory.HostArena", partial(HostArena, chunk_bytes=1))
    w = world(model, gpu_pages=22, host_pages=90, **SIZES, **options)
    torch.cuda._sleep(1)  # loads its kernel, which would wait for all streams
    _delayed(w)
    return w


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_scores_over_late_loads_keep_the_contract(
    world: Make, monkeypatch: pytest.MonkeyPatch, graphs: str, changes: dict[str, Any]
) -> None:
    model = small_model(5, **OVERLAPPED, **changes)
    plain = _live(world(model, cache="off", **SIZES), waiting=0)
    w = _overlapping(world, monkeypatch, model, graphs=graphs, write_back_queue="40%")
    cached = _live(w, waiting=2)
    assert all(np.array_equal(mine.candidates, its.candidates) for mine, its in zip(cached, plain, strict=True))
    truth = [each.expected() for each in plain]
    baseline = _error(plain, truth)
    assert 1e-4 < baseline < 0.1
    assert _error(cached, truth) <= 1.2 * baseline + 1e-4
    assert max(_errors(cached, truth)) <= 2 * max(_errors(plain, truth)) + 1e-4
    assert w.value("prefix_tokens_total", "host") > 2000
    assert w.value("batches_over_loads_total") > 0
    waits = [w.value("load_wait_seconds_total", str(group)) for group in range(4)]
    assert waits == sorted(waits)
    assert waits[3] > 0.001
    _finish(w)
    for kind in (LOAD, STORE):
        assert w.value(f"{kind}s_total") > 5
        assert w.value(f"{kind}s_failed_total") == 0
    w.assert_idle()
    w.assert_empty()


def test_every_byte_of_copies_beside_late_batches(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is corrected here: a batch that does so writes what a store under way then copies for nothing."""
    w = _overlapping(world, monkeypatch, small_model(5, **OVERLAPPED))
    copies = ComparedCopies(w.tiers.mover, 64)
    pending = _live(w, waiting=2, corrections=False)
    assert all(np.isfinite(each.future.result(0).logits).all() for each in pending)
    _finish(w)
    assert w.value("batches_over_loads_total") > 0
    for kind in (LOAD, STORE):
        assert copies.compared[kind] == w.value(f"{kind}s_total") > 5
    assert not copies.open
    w.assert_empty()


def test_a_store_begins_only_after_the_batch_that_wrote_its_pages(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mover waits for no stream: the engine submits a store once it has seen the batch done."""
    w = _overlapping(world, monkeypatch, small_model(5, **OVERLAPPED))
    tiers, runner = w.tiers, w.engine._core.served.runner
    reserve, start, submit = tiers.reserve, runner.start, tiers.mover.submit
    reserved: dict[str, range] = {}  # tokens that the batch now being planned will write
    launched: list[tuple[Any, dict[str, range]]] = []
    checked = 0

    def noted_reserve(slots: Any) -> Any:
        nonlocal reserved
        reservation = reserve(slots)
        spans = zip(reservation.cached.tolist(), reservation.stored.tolist(), strict=True)
        reserved = {slot.user_id: range(*span) for slot, span in zip(slots, spans, strict=True)}
        return reservation

    def noted_start(*arguments: Any) -> Any:
        delay_stream(torch.cuda.current_stream(), 5 * MS)
        launched.append((start(*arguments), reserved))
        return launched[-1][0]

    def checked_submit(kind: str, copies: Sequence[Copy]) -> None:
        nonlocal checked
        # Batches before the last two have landed, or these could not have begun; their events are others' by now.
        for batch, written in launched[-2:] if kind == STORE else []:
            for copy in copies:
                span = written.get(copy.user, range(0))
                if max(span.start, copy.first_token) < min(span.stop, copy.tokens):
                    assert batch.done.passed()
                    checked += 1
        submit(kind, copies)

    tiers.reserve, runner.start, tiers.mover.submit = noted_reserve, noted_start, checked_submit
    for index, user in enumerate("abcdef"):
        w.put(user, 200 + 50 * index)
    for _ in range(40):
        users = w.rng.choice(list("abcdef"), 2, replace=False)
        for user in users:
            w.append(user, int(w.rng.integers(1, 12)))
        both = [w.submit(str(user)).future for user in users]
        _step_until(w, lambda open=both: any(future.done() for future in open))
    _finish(w)
    assert checked > 20
    assert w.value("stores_total") > 20
    w.assert_empty()


class SlowPinning(CudaPinning):
    """As the pinning of a terabyte is."""

    def pin(self, address: int, size: int) -> None:
        time.sleep(0.01)
        super().pin(address, size)


def test_the_host_tier_is_pinned_while_the_engine_serves(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.engine.memory.CudaPinning", SlowPinning)
    monkeypatch.setattr("mtserve.engine.memory.HostArena", partial(HostArena, chunk_bytes=1 << 20))
    w = world(small_model(), gpu_pages=30, host_pages=40_000, start=True, tolerance=5e-5)
    end, facts = time.monotonic() + 60, w.engine.stats()["host_memory"]
    assert 0 < facts["ready_bytes"] < facts["bytes"]
    for user in "abcdef":
        w.put(user, 21)
    rounds = 0
    while rounds < 5 or facts["ready_bytes"] < facts["bytes"]:
        assert time.monotonic() < end
        pending = [w.submit(user) for user in "abcdef"]
        for each in pending:
            each.future.result(30)
            each.verify()
        rounds, facts = rounds + 1, w.engine.stats()["host_memory"]
    assert facts["error"] is None
    assert w.engine.drain(20)
    assert w.engine.stats()["tiers"]["host"]["pages"]["total"] == 40_000
    assert w.value("loads_total") > 0
    arena = w.tiers.mover.arena
    assert arena[-1].is_pinned()
    w.assert_empty()
    w.engine.close()
    assert not arena[-1].is_pinned()


def test_threads_on_a_running_engine(world: Make) -> None:
    w = world(small_model(), gpu_pages=20, host_pages=60, start=True, tolerance=5e-5)
    for user in "abcdef":
        w.put(user, 21)
    answers: list[Pending] = []
    histories = {user: w.history_of(user) for user in "abcdef"}

    def run(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for user in rng.choice(list("abcdef"), 30):
            candidates = make_candidates(rng, 2, START_MS * 2)
            future = w.engine.submit(Request(str(user), candidates))
            future.exception(30)
            answers.append(Pending(w, future, histories[str(user)], candidates))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 120
    for each in answers:
        each.verify()
    assert w.engine.drain(20)
    w.assert_empty()


def test_a_model_on_the_gpu_is_the_callers_model_unchanged(world: Make) -> None:
    model = small_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    w = world(model, dtype="bfloat16", tolerance=0.1)
    w.put("a", 17)
    w.put_rows("a", make_behaviours(w.rng, 9), None)
    pending = w.submit("a")
    _finish(w)
    pending.verify()
    assert w.engine.model is not model
    assert w.engine.model.device.type == DEVICE
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.device.type == "cpu"
