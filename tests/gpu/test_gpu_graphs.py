"""The engine on the CUDA kernels and captured graphs, held to the contract: fp32 recompute, and plain torch's error.

Deterministic scores are held to themselves, bit by bit, in whatever company.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CAUSAL, START_MS, make_behaviours, make_candidates, make_features, small_model

from mtserve.config import EngineConfig
from mtserve.engine.engine import Engine
from mtserve.engine.forward.graph_key import usual_keys
from mtserve.engine.forward.graphs import RUNS_BEFORE_CAPTURE
from mtserve.engine.forward.metadata import bucket_rows
from mtserve.engine.forward.runners import largest_batch, make_runner
from mtserve.engine.setup import page_shape
from mtserve.model.ranking import RankingModel
from mtserve.model.reference import recompute
from mtserve.types import History, Request, Rows

pytestmark = pytest.mark.gpu
SHAPES = [
    {"d": 64, "heads": 2, "head_dim": 32},
    {"d": 96, "heads": 3, "head_dim": 64},
    {"d": 128, "heads": 4, "head_dim": 128},
    {"d": 128, "heads": 2, "head_dim": 256},
]
LENGTHS = {"layers": 3, "max_history": 700, "max_realtime": 100, "attention_length": 256}
# No cut falls into these lives, and a prefix is long enough for its keys to be summed in several chunks.
LONG = {"layers": 3, "max_history": 2000, "max_realtime": 600, "attention_length": 256}


@dataclass(frozen=True)
class Played:
    """The logits of all requests, what each request asked, and the engine's stats at the end."""

    logits: np.ndarray  # type: ignore[type-arg]
    asked: list[tuple[History, Rows]]
    stats: dict[str, Any]

    def truth(self, model: RankingModel) -> np.ndarray:  # type: ignore[type-arg]
        """The logits of a full fp32 recompute; seconds on a CPU."""
        return np.concatenate([recompute(model, *each).numpy() for each in self.asked])

    def asks_the_same_as(self, other: Played) -> bool:
        pairs = zip(self.asked, other.asked, strict=True)
        return all(
            np.array_equal(mine[0].behaviours, its[0].behaviours) and np.array_equal(mine[1], its[1])
            for mine, its in pairs
        )


def _play(model: RankingModel, rounds: int = 12, **config: Any) -> Played:
    """A seeded life of five users: appends, bursts of requests, evictions, corrections."""
    rng = np.random.default_rng(5)
    schema = model.schema
    options = EngineConfig(
        device="cuda",
        dtype="bfloat16",
        page_tokens=64,
        poison_pages=True,
        host_cache="64MiB",
        write_back_idle_ms=0,
        **{"graphs": "on", **config},
    )
    got, asked = [], []
    with Engine(model, options, start=False) as engine:
        ends = {}
        for user in "abcde":
            rows = make_behaviours(rng, int(rng.integers(0, 500)), START_MS, schema)
            engine.put_user(user, make_features(rng, schema), rows)
            ends[user] = int(rows["time_ms"][-1]) if len(rows) else START_MS
        for step in range(rounds):
            pending = []
            for user in rng.choice(list("abcde"), int(rng.integers(1, 6)), replace=False):
                if rng.random() < 0.7:
                    rows = make_behaviours(rng, int(rng.integers(1, 60)), ends[user], schema)
                    ends[user] = int(rows["time_ms"][-1])
                    engine.append(user, rows)
                if step == 7:
                    engine.truncate(user, max(0, engine.history.position(user) - 5))
                    kept = engine.history.read(user).behaviours["time_ms"]
                    ends[user] = int(kept[-1]) if len(kept) else START_MS
                exposures = ends[user] + rng.integers(-(10**7), 10**7, int(rng.integers(1, 130)))
                candidates = make_candidates(rng, len(exposures), np.maximum(exposures, 0), schema)
                asked.append((engine.history.read(user, last=model.config.max_history), candidates))
                pending.append(engine.submit(Request(str(user), candidates)))
            while any(not future.done() for future in pending):
                engine.step()
                engine.check()
            got += [future.result().logits for future in pending]
        stats = engine.stats()
    return Played(np.concatenate(got), asked, stats)


def _relative_l2(got: np.ndarray, truth: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("changes", [{}, CAUSAL, {"gate_first": True, "norm": "plain"}], ids=["full", "causal", "gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=[str(shape["head_dim"]) for shape in SHAPES])
def test_scores_on_graphs_keep_the_contract(shape: dict[str, Any], changes: dict[str, Any]) -> None:
    model = small_model(1, **shape, **LENGTHS, **changes)
    eager = _play(model, cache="off", kernels="eager", gpu_cache="64MiB")
    truth = eager.truth(model)
    plain = _relative_l2(eager.logits, truth)
    assert 1e-4 < plain < 0.1
    assert eager.stats["runner"]["padded_rows_share"] is None
    page = 2 * 64 * 3 * model.config.heads * model.config.head_dim * 2
    few_pages, roomy = {"gpu_cache": f"{20 * page}B"}, {"gpu_cache": "64MiB"}
    for config in (few_pages, roomy, {**roomy, "cache": "off"}, {**few_pages, "deterministic": True}):
        played = _play(model, kernels="cuda", **config)
        assert played.asks_the_same_as(eager)
        assert played.stats["kernels"] == "cuda"
        assert _relative_l2(played.logits, truth) <= 1.2 * plain + 1e-4


@pytest.mark.parametrize("cache", ["on", "off"])
def test_the_engines_own_thread_needs_no_other_cuda_call_first(cache: str) -> None:
    model, rng = small_model(2, **SHAPES[2], **LENGTHS), np.random.default_rng(0)
    candidates = make_candidates(rng, 40, START_MS + 10**9, model.schema)
    rows = make_behaviours(rng, 300, START_MS, model.schema)
    logits = []
    for start in (True, False):
        options = EngineConfig(
            device="cuda", dtype="bfloat16", kernels="cuda", gpu_cache="64MiB", host_cache="0", cache=cache, graphs="on"
        )
        with Engine(model, options, start=start) as engine:
            engine.put_user("a", history=rows)
            future = engine.submit(Request("a", candidates))
            while not start and not future.done():
                engine.step()
            logits.append(future.result(30).logits)
    assert np.array_equal(*logits)


def test_without_graphs_the_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.engine.forward.graphs.RUNS_BEFORE_CAPTURE", 1)
    model = small_model(2, **SHAPES[2], **LENGTHS)
    captured = _play(model, 24, kernels="cuda", gpu_cache="64MiB")
    launched = _play(model, 24, kernels="cuda", gpu_cache="64MiB", graphs="off")
    assert np.array_equal(captured.logits, launched.logits)
    assert captured.stats["runner"]["captures"] > 0
    assert launched.stats["runner"]["captures"] == launched.stats["runner"]["graphs"] == 0


def _logits_of_one(model: RankingModel, others: int, rounds: int = 4, **config: Any) -> np.ndarray:  # type: ignore[type-arg]
    """float32 [rounds, candidates, tasks]: what one user gets, with requests of `others` in each of its batches."""
    schema, mine, theirs = model.schema, np.random.default_rng(1), np.random.default_rng(2)
    users = [f"other {index}" for index in range(others)]
    users.insert(others // 2, "one")
    options = EngineConfig(
        device="cuda", dtype="bfloat16", kernels="cuda", deterministic=True, poison_pages=True,
        gpu_cache="256MiB", host_cache="0", max_batch_tokens=20480, cold_batch_tokens=20480, **{"graphs": "on", **config},
    )  # fmt: skip
    got, ends = [], {}
    with Engine(model, options, start=False) as engine:
        for user in users:
            rng, history = (mine, 1400) if user == "one" else (theirs, int(theirs.integers(700, 1000)))
            rows = make_behaviours(rng, history, START_MS, schema)
            engine.put_user(user, make_features(rng, schema), rows)
            ends[user] = int(rows["time_ms"][-1])
        for _ in range(rounds):
            pending = {}
            for user in users:
                rng, candidates = (mine, 100) if user == "one" else (theirs, int(theirs.integers(200, 400)))
                rows = make_behaviours(rng, 20, ends[user], schema)
                ends[user] = int(rows["time_ms"][-1])
                engine.append(user, rows)
                exposures = ends[user] + rng.integers(-(10**6), 10**7, candidates)
                pending[user] = engine.submit(Request(user, make_candidates(rng, candidates, exposures, schema)))
            while any(not future.done() for future in pending.values()):
                engine.step()
            engine.check()
            got.append(pending["one"].result().logits)
        assert engine.metrics.value("batches_total") == rounds  # each held everybody's requests
        assert engine.metrics.distribution("batch_requests").sum == rounds * len(users)
        assert engine.stats()["tiers"]["gpu"]["evicted_pages"] == 0
    logits = np.stack(got)
    assert np.isfinite(logits).all()
    return logits


@pytest.mark.parametrize("shape", SHAPES[1:], ids=[str(shape["head_dim"]) for shape in SHAPES[1:]])
def test_deterministic_scores_have_the_same_bits_in_any_company(shape: dict[str, Any]) -> None:
    """With twelve others attention is cut into fewer runs and products take larger tiles than with nobody else."""
    model = small_model(3, **shape, **LONG)
    alone = _logits_of_one(model, others=0)
    for others, config in ((0, {}), (12, {}), (12, {}), (12, {"graphs": "off"}), (3, {"graphs": "off"})):
        np.testing.assert_array_equal(_logits_of_one(model, others, **config), alone, err_msg=f"{others} {config}")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=[str(shape["head_dim"]) for shape in SHAPES[1:]])
def test_graphs_captured_ahead_serve_the_first_batches(shape: dict[str, Any], deterministic: bool) -> None:
    model = small_model(2, **shape, **LENGTHS)
    config = {"kernels": "cuda", "gpu_cache": "64MiB", "deterministic": deterministic, "max_batch_tokens": 2048}
    ahead = _play(model, graphs="ahead", **config)
    rows, layers = largest_batch(model, EngineConfig(max_batch_tokens=2048)), model.config.layers
    usual = set(usual_keys(rows, layers, shape["head_dim"], deterministic=deterministic, loads=True))
    assert ahead.stats["runner"]["captures"] >= len(usual) > 20
    launched = _play(model, graphs="off", **config)
    assert np.array_equal(ahead.logits, launched.logits)


def test_capturing_ahead_writes_no_page() -> None:
    model = small_model(2, **SHAPES[2], **LENGTHS)
    options = EngineConfig(device="cuda", dtype="bfloat16", gpu_cache="64MiB", host_cache="0", max_batch_tokens=1024)
    shape = page_shape(model.config, options, torch.bfloat16)
    pool = torch.full((40, *shape.sizes), 7.0, dtype=torch.bfloat16, device="cuda")
    runner = make_runner(model.to("cuda", torch.bfloat16), options, "cuda", pool)
    runner.prepare()
    runner.settle()
    assert runner.stats()["captures"] > 20
    assert (pool == 7.0).all()


def test_evicted_graphs_are_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.engine.forward.graphs.RUNS_BEFORE_CAPTURE", 1)
    model = small_model(2, **SHAPES[2], **LENGTHS)
    kept = _play(model, 40, kernels="cuda", gpu_cache="64MiB")
    assert kept.stats["runner"]["captures"] == kept.stats["runner"]["graphs"] > 2
    assert kept.stats["runner"]["graph_evictions"] == 0
    monkeypatch.setattr("mtserve.engine.forward.graphs.MAX_GRAPHS", 2)
    evicted = _play(model, 40, kernels="cuda", gpu_cache="64MiB")
    runner = evicted.stats["runner"]
    assert runner["graphs"] == 2
    assert runner["graph_evictions"] == runner["captures"] - 2 > 0
    assert runner["captures"] >= kept.stats["runner"]["captures"]
    assert np.array_equal(evicted.logits, kept.logits)


def test_a_bucket_of_rows_is_captured_when_it_comes_often_and_once() -> None:
    """With head dim 256 and deterministic sums there is one tile and one kind of output: one graph a bucket."""
    model = small_model(4, **SHAPES[3], **LENGTHS)
    rng = np.random.default_rng(6)
    sizes = [int(rng.integers(1, 1500)) for _ in range(60)]
    options = EngineConfig(
        device="cuda", dtype="bfloat16", deterministic=True, gpu_cache="64MiB", host_cache="0", graphs="on"
    )
    with Engine(model, options, start=False) as engine:
        engine.put_user("a", make_features(rng, model.schema), make_behaviours(rng, 300, START_MS, model.schema))
        states = engine.prefetch("a")
        while not states.done():
            engine.step()
        for size in sizes:
            engine.score("a", make_candidates(rng, size, 2 * START_MS, model.schema))
        runner = engine.stats()["runner"]
    rows = [len(model.schema.user) + 300, *sizes]
    buckets = [bucket_rows(each) for each in rows]
    often = {bucket for bucket in buckets if buckets.count(bucket) > RUNS_BEFORE_CAPTURE}
    assert 0 < runner["captures"] == runner["graphs"] == len(often) < len(set(buckets))
    assert runner["rows"] == sum(buckets)
    assert runner["padded_rows"] == sum(buckets) - sum(rows)
    assert runner["padded_rows_share"] == runner["padded_rows"] / runner["rows"]


def test_auto_takes_the_cuda_kernels_where_they_can_run() -> None:
    fits = small_model(0, **SHAPES[1], **LENGTHS)
    for model, config, kernels in (
        (fits, {}, "cuda"),
        (fits, {"dtype": "float16"}, "cuda"),
        (fits, {"dtype": "float32"}, "eager"),
        (fits, {"page_tokens": 32}, "eager"),
        (small_model(0), {}, "eager"),
    ):
        with Engine(
            model, EngineConfig(device="cuda", gpu_cache="64MiB", host_cache="0", graphs="on", **config), start=False
        ) as engine:
            assert engine.stats()["kernels"] == kernels
