"""The engine and the kernels on CUDA, held to the same truth as on the CPU.

The contract in bf16: the relative L2 error of the logits against a full fp32 recompute is at most
1.2 times what the engine without a cache has, over the same histories and many candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import Pending, World
from kernel_plans import Shape, make_batch
from small_models import CAUSAL, START_MS, make_behaviours, make_candidates, small_model

from mtserve.cache.index import Copy
from mtserve.kernels.backend import load_kernels
from mtserve.transfer.mover import LOAD, STORE, CudaMover
from mtserve.transfer.pool import PageShape, allocate_arena, allocate_pool
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


# Copies


@pytest.mark.parametrize("kind", [LOAD, STORE])
def test_copies_over_the_link_are_exact(kind: str) -> None:
    shape = PageShape(layers=3, page_tokens=16, heads=2, head_dim=64, dtype=torch.bfloat16)
    pool = allocate_pool(shape, 70, torch.device(DEVICE, 0), poison=False)
    arena = allocate_arena(shape, 90, pinned=True, poison=False)
    assert arena.is_pinned()
    rng = np.random.default_rng(1)
    mover = CudaMover(pool, arena)
    for ticket in range(20):
        pool.copy_(torch.randn(pool.shape))
        arena.copy_(torch.randn(arena.shape))
        inside = rng.permutation(70)[:40].astype(np.int32)
        outside = rng.permutation(90)[:40].astype(np.int32)
        source, target = (arena, pool) if kind == LOAD else (pool, arena)
        expected = target.clone()
        into, out_of = (inside, outside) if kind == LOAD else (outside, inside)
        expected[torch.from_numpy(into.astype(np.int64)).to(target.device)] = source[
            torch.from_numpy(out_of.astype(np.int64)).to(source.device)
        ].to(target.device)
        # The stores' source is overwritten by the compute stream right before, and must be waited for.
        if kind == STORE:
            pool.mul_(1)
        mover.submit(kind, [Copy(ticket, "", inside, outside, 0, 0)])
        mover.wait()
        (finished,) = mover.poll()
        assert (finished.ticket, finished.error) == (ticket, None)
        assert _bytes(target) == _bytes(expected)
    assert mover.pending() == 0


def test_a_store_waits_for_the_compute_that_wrote_its_page() -> None:
    shape = PageShape(layers=8, page_tokens=64, heads=4, head_dim=128, dtype=torch.bfloat16)
    pool = allocate_pool(shape, 8, torch.device(DEVICE, 0), poison=True)
    arena = allocate_arena(shape, 8, pinned=True, poison=True)
    mover = CudaMover(pool, arena)
    pages = np.arange(8, dtype=np.int32)
    large = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    for value in range(1, 6):
        busy = large
        for _ in range(20):
            busy = busy @ large * 0.01
        pool.fill_(float(value))
        mover.submit(STORE, [Copy(value, "", pages, pages, 0, 0)])
        mover.wait()
        assert len(mover.poll()) == 1
        assert bool((arena == value).all())
        assert bool(torch.isfinite(busy).all())


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


def test_evict_and_reload_storms_keep_every_byte(world: Make) -> None:
    """Pages are compared when their copy ends and before anybody else may touch them."""
    model = small_model(3, layers=8, d=64, heads=4, head_dim=128, max_history=200, max_realtime=20)
    w = world(model, gpu_pages=26, host_pages=90, page_tokens=16, dtype="bfloat16", tolerance=0.1)
    mover = w.tiers.mover
    submitted: dict[tuple[str, int], tuple[Any, Any]] = {}
    compared = {LOAD: 0, STORE: 0}
    submit, poll = mover.submit, mover.poll

    def noted(kind: str, ticket: int, pool_pages: Any, arena_pages: Any) -> None:
        submitted[kind, ticket] = (pool_pages.copy().astype(np.int64), arena_pages.copy().astype(np.int64))
        submit(kind, ticket, pool_pages, arena_pages)

    def checked() -> Any:
        finished = poll()
        for job in finished:
            inside, outside = submitted.pop((job.kind, job.ticket))
            device_side = mover.pool[torch.from_numpy(inside).to(mover.pool.device)]
            assert _bytes(device_side) == _bytes(mover.arena[torch.from_numpy(outside)])
            compared[job.kind] += 1
        return finished

    mover.submit, mover.poll = noted, checked
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
    assert compared[LOAD] > 10
    assert compared[STORE] > 20
    assert not submitted
    w.assert_idle()
    w.assert_empty()


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
