"""Restoring on CUDA: every format and every split, on the kernels and graphs that serve, with pages poisoned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from engine_world import Pending, World
from small_models import CAUSAL, small_model

from mtserve.errors import TransferFailed
from mtserve.model.ranking import RankingModel
from mtserve.transfer.mover import Fault

pytestmark = pytest.mark.gpu
LAYERS = 4
FORMATS = {"kv": 0.0, "kv8": 5e-3, "x8": 5e-3, "x4": 4e-2}  # relative L2 that a format may add
USERS = ("a", "b", "c")
WAYS = ("load", "split", "recompute")


def model_of(**changes: object) -> RankingModel:
    sizes = {"layers": LAYERS, "d": 96, "heads": 2, "head_dim": 64, "max_history": 600, "attention_length": 512}
    return small_model(**{**sizes, "max_realtime": 600, **CAUSAL, **changes})


@pytest.fixture(scope="module")
def bf16_error() -> float:
    """Relative L2 that the engine without a cache has against fp32."""
    w = World(model_of(), device="cuda", dtype="bfloat16", page_tokens=64, cache="off")
    try:
        for user in USERS:
            w.put(user, 400)
        pending = [w.submit(user, 64) for user in USERS]
        w.run()
        return relative_l2(pending)
    finally:
        w.engine.close()


@pytest.fixture(params=FORMATS)
def restoring(request: pytest.FixtureRequest) -> Iterator[tuple[World, str]]:
    """A world in which the users' states are on the host, and at most a few of them on the device."""
    w = World(
        model_of(), device="cuda", dtype="bfloat16", page_tokens=64, gpu_pages=22, host_pages=80,
        host_format=request.param,
    )  # fmt: skip
    assert w.engine._core.kernels == "cuda"
    try:
        for user in USERS:
            w.put(user, 380)
            w.submit(user)
            w.run()
        yield w, request.param
        w.assert_idle()
    finally:
        w.engine.close()
        w.engine.check()


def relative_l2(pending: Sequence[Pending]) -> float:
    got = np.concatenate([each.future.result(timeout=0).logits for each in pending])
    expected = np.concatenate([each.expected() for each in pending])
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def evict(w: World) -> None:
    for filler in ("x", "y", "z"):
        if filler not in w.rows:
            w.put(filler, 500)
        w.submit(filler)
        w.run()


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_every_split_keeps_the_contract(restoring: tuple[World, str], bf16_error: float, layer: int) -> None:
    w, host_format = restoring
    bound = 1.2 * bf16_error + FORMATS[host_format]
    way = "load" if layer == 0 else "recompute" if layer == LAYERS else "split"
    for turn in range(3):
        evict(w)
        assert all(w.held(user)[0] < w.held(user)[1] for user in USERS)
        w.restore_at(layer)
        w.append("a", 5 + 60 * turn)
        before = w.value("restored_batches_total", way)
        pending = [w.submit(user, 64) for user in USERS]
        w.run()
        assert w.value("restored_batches_total", way) == before + 1
        assert relative_l2(pending) <= bound
        if way != "recompute":
            assert all(each.future.result().host_tokens > 300 for each in pending)
        # What came back serves from the device.
        again = [w.submit(user, 64) for user in USERS]
        w.run()
        assert relative_l2(again) <= bound
        assert all(each.future.result().encoded_tokens == 0 for each in again)


def test_chaos_and_random_splits(restoring: tuple[World, str], bf16_error: float) -> None:
    """Users come back in any number, layers are split anywhere, histories grow and are cut, loads fail."""
    w, host_format = restoring
    bound = 2 * bf16_error + FORMATS[host_format]
    rng = np.random.default_rng(11)
    w.engine._core.tiers.mover._fault = fail_some(rng)
    for _ in range(40):
        if rng.random() < 0.4:
            evict(w)
        w.restore_at(int(rng.integers(LAYERS + 1)))
        for user in USERS:
            if rng.random() < 0.3:
                w.append(user, int(rng.integers(1, 9)))
            elif rng.random() < 0.1:
                w.truncate(user, len(w.rows[user]) - int(rng.integers(1, 90)))
        asked = [user for user in USERS if rng.random() < 0.7]
        pending = [w.submit(user, 64) for user in asked]
        w.run()
        if pending:
            assert relative_l2(pending) <= bound
    assert w.value("loads_total") > 10
    assert w.value("loads_failed_total") > 0


def fail_some(rng: np.random.Generator) -> Fault:
    def fault(kind: str) -> None:
        if rng.random() < 0.1:
            raise TransferFailed(f"a {kind} that was to fail")

    return fault


@pytest.mark.calibrates
def test_costs_are_calibrated_and_decide(restoring: tuple[World, str], bf16_error: float) -> None:
    w, host_format = restoring
    costs = w.tiers.restoring._costs
    rates = [rate for _, rate in costs.link]
    assert len(rates) >= 3 and 5e9 < max(rates) < 80e9
    assert 0 < costs.compute_s(1000, 500_000) < 1e-3
    assert (costs.unpack_s > 0) == (host_format != "kv")
    evict(w)
    before = sum(w.value("restored_batches_total", way) for way in WAYS)
    pending = [w.submit(user, 64) for user in USERS]
    w.run()
    assert relative_l2(pending) <= 1.2 * bf16_error + FORMATS[host_format]
    assert sum(w.value("restored_batches_total", way) for way in WAYS) == before + 1
