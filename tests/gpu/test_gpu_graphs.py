"""The engine on the CUDA kernels and captured graphs, held to the contract: fp32 recompute, and plain torch's error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import CAUSAL, START_MS, make_behaviours, make_candidates, make_features, small_model

from mtserve.config import EngineConfig
from mtserve.engine.engine import Engine
from mtserve.model.ranking import RankingModel
from mtserve.model.reference import recompute
from mtserve.types import Request

pytestmark = pytest.mark.gpu
SHAPES = [
    {"d": 64, "heads": 2, "head_dim": 32},
    {"d": 96, "heads": 3, "head_dim": 64},
    {"d": 128, "heads": 4, "head_dim": 128},
    {"d": 128, "heads": 2, "head_dim": 256},
]
LENGTHS = {"layers": 3, "max_history": 700, "max_realtime": 100, "attention_length": 256}


def _play(model: RankingModel, rounds: int = 12, **config: Any) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:  # type: ignore[type-arg]
    """(logits, fp32 truth, stats) of a seeded life of five users: appends, bursts of requests, evictions, corrections."""
    rng = np.random.default_rng(5)
    schema = model.schema
    options = EngineConfig(
        device="cuda", dtype="bfloat16", page_tokens=64, poison_pages=True, host_cache="64MiB", **config
    )
    got, truth = [], []
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
                history = engine.history.read(user, last=model.config.max_history)
                pending.append((engine.submit(Request(str(user), candidates)), recompute(model, history, candidates)))
            while any(not future.done() for future, _ in pending):
                engine.step()
                engine.check()
            for future, expected in pending:
                got.append(future.result().logits)
                truth.append(expected.numpy())
        stats = engine.stats()
    return np.concatenate(got), np.concatenate(truth), stats


def _relative_l2(got: np.ndarray, truth: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("changes", [{}, CAUSAL, {"gate_first": True, "norm": "plain"}], ids=["full", "causal", "gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=[str(shape["head_dim"]) for shape in SHAPES])
def test_scores_on_graphs_keep_the_contract(shape: dict[str, Any], changes: dict[str, Any]) -> None:
    model = small_model(1, **shape, **LENGTHS, **changes)
    logits, truth, _ = _play(model, cache="off", kernels="eager", gpu_cache="64MiB")
    plain = _relative_l2(logits, truth)
    assert 1e-4 < plain < 0.1
    page = 2 * 64 * 3 * model.config.heads * model.config.head_dim * 2
    for config in ({"gpu_cache": f"{20 * page}B"}, {"gpu_cache": "64MiB"}, {"gpu_cache": "64MiB", "cache": "off"}):
        logits, again, stats = _play(model, kernels="cuda", **config)
        assert np.array_equal(truth, again)
        assert stats["kernels"] == "cuda"
        assert _relative_l2(logits, truth) <= 1.2 * plain + 1e-4


def test_without_graphs_the_scores_are_the_same() -> None:
    model = small_model(2, **SHAPES[2], **LENGTHS)
    captured, _, _ = _play(model, kernels="cuda", gpu_cache="64MiB")
    launched, _, _ = _play(model, kernels="cuda", gpu_cache="64MiB", graphs="off")
    assert np.array_equal(captured, launched)


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
            model, EngineConfig(device="cuda", gpu_cache="64MiB", host_cache="0", **config), start=False
        ) as engine:
            assert engine.stats()["kernels"] == kernels
