from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay_world import small_trace, tiny_model

from mtserve.config import EngineConfig, ModelConfig
from mtserve.engine.forward.batch import BatchPlan, EarlyLayers
from mtserve.engine.forward.runner import Done, Runner
from mtserve.engine.memory import Memory
from mtserve.engine.queue.pace import Line, Pace
from mtserve.engine.stopwatch import PHASES
from mtserve.errors import InvalidArgument
from mtserve.model.ranking import RankingModel
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.model.weights import initialise
from mtserve.trace.pyplot import require_matplotlib
from mtserve.trace.replay.agreement import (
    FORMAT_ERRORS,
    GPU_FORMAT_ERRORS,
    Difference,
    Verification,
    difference,
    judge,
    misplaced,
)
from mtserve.trace.replay.config import ReplayConfig
from mtserve.trace.replay.features import CATEGORIES, TraceRows
from mtserve.trace.replay.report import time_by_phase, write_report
from mtserve.trace.replay.runs import ReplayResult, replay, size_tiers
from mtserve.trace.replay.summary import repeats, summarise
from mtserve.trace.working_set import resolve_capacity, working_set_pages
from mtserve.transfer.mover import Arrivals, SyncMover

CPU = EngineConfig(device="cpu", page_tokens=16, gpu_cache="40%ws", host_cache="100%ws", poison_pages=True)
REQUIRED = {
    "requests", "users", "device", "model", "seed", "commit", "hit_ratio", "latency_ms", "throughput_rps",
    "baseline", "speedup", "max_score_difference", "agreement", "memory", "loop", "processor", "engine_config", "time",
}  # fmt: skip
TIMES = {
    "wall_s", "loop", "batches_s", "load_s", "store_s", "load_gb_per_s", "store_gb_per_s", "batches",
    "batches_over_loads", "load_wait_s", "loads_declined", "write_backs_deferred", "evicted_unsaved_pages",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def result() -> ReplayResult:
    """With `load`, what comes from the host does not depend on how fast this machine encodes."""
    torch.set_num_threads(1)
    engine = replace(CPU, restore="load")
    return replay(small_trace(), tiny_model(), engine, ReplayConfig(concurrency=2, verify=4, verify_tokens=300))


def test_cached_scores_agree_with_uncached_ones_under_eviction(result: ReplayResult) -> None:
    agreement = result.agreement
    assert agreement.holds, agreement.broken
    assert agreement.compared.requests == result.trace.requests
    assert 0 < agreement.compared.max_score <= 1e-5
    assert agreement.verified.requests == 4
    assert agreement.verified.cached.max_score <= 1e-5
    assert result.cached.counters["evicted_pages_gpu"] > 0
    assert result.cached.counters["loads_total"] > 0


def test_the_summary_has_every_key_and_adds_up(result: ReplayResult) -> None:
    summary = json.loads(json.dumps(summarise(result)))
    assert set(summary) >= REQUIRED
    assert summary["requests"] == 45
    assert summary["loop"] == {"mode": "closed", "concurrency": 2}
    assert summary["model"] == "tiny"
    for by in ("request", "token"):
        ratios = summary["hit_ratio"][by]
        assert ratios["total"] == pytest.approx(ratios["gpu"] + ratios["host"])
        assert ratios["host"] > 0
        assert summary["hit_ratio_after_first"][by]["total"] > ratios["total"] > 0.2
    for run in (summary, summary["baseline"]):
        assert 0 < run["latency_ms"]["p50"] <= run["latency_ms"]["p95"] <= run["latency_ms"]["p99"]
        assert run["throughput_rps"] == pytest.approx(45 / run["wall_s"])
    assert summary["speedup"] == pytest.approx(summary["throughput_rps"] / summary["baseline"]["throughput_rps"])
    tokens = summary["tokens"]
    assert tokens["prefix"] == tokens["gpu"] + tokens["host"] + tokens["encoded"]
    # Without a cache every prefix and candidate is computed; with one, less by what was found.
    candidates = int(result.trace.cand_offsets[-1])
    assert summary["baseline"]["batch_tokens"] == tokens["prefix"] + candidates
    assert summary["batch_tokens"] < summary["baseline"]["batch_tokens"]
    assert summary["padded_rows_share"] is summary["baseline"]["padded_rows_share"] is None
    memory = summary["memory"]
    assert memory["gpu"]["peak_pages"] <= memory["gpu"]["capacity_pages"]
    assert memory["load_bytes"] % memory["page_bytes"] == 0


def test_the_phases_of_the_loop_are_the_whole_of_its_time(result: ReplayResult) -> None:
    summary = json.loads(json.dumps(summarise(result)))
    for run, log in ((summary, result.cached), (summary["baseline"], result.baseline)):
        time = run["time"]
        assert set(time) == TIMES
        assert tuple(time["loop"]) == PHASES
        assert min(time["loop"].values()) >= 0
        assert time["loop"]["device"] > 0
        assert time["wall_s"] == run["wall_s"]
        assert sum(time["loop"].values()) == pytest.approx(time["wall_s"], rel=0.05, abs=0.02)
        # A batch is what the loop waits for on the CPU, where none overlaps another.
        assert time["batches_s"] == pytest.approx(time["loop"]["device"], rel=0.05, abs=0.02)
        # Only the measured part: the engine ran histories and warm-up before it.
        assert log is not None
        assert 0 < time["batches"] == run["batches"] < log.stats["metrics"]["batches_total"]
        assert sum(time["loop"].values()) < sum(log.stats["loop_seconds"].values())


def test_the_time_of_copies_is_told_with_their_speed(result: ReplayResult) -> None:
    summary = summarise(result)
    time, memory = summary["time"], summary["memory"]
    for kind in ("load", "store"):
        assert 0 < time[f"{kind}_s"] < time["wall_s"]
        assert time[f"{kind}_gb_per_s"] == pytest.approx(memory[f"{kind}_bytes"] / time[f"{kind}_s"] / 1e9)
    baseline = summary["baseline"]["time"]
    assert baseline["load_s"] == baseline["store_s"] == baseline["evicted_unsaved_pages"] == 0
    assert baseline["load_gb_per_s"] is baseline["store_gb_per_s"] is None


def test_what_was_put_off_is_counted_over_the_measured_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the groups of layers of every batch, those of the warm-up included, had waited for loads."""
    monkeypatch.setattr(Done, "waited", lambda batch: {0: 0.25, 2: 0.5})
    engine = replace(CPU, write_back_queue="1", write_back_idle_ms=3_600_000)
    result = replay(small_trace(), tiny_model(), engine, ReplayConfig(concurrency=2, verify=0, baseline_requests=4))
    summary = summarise(result)
    for time in (summary["time"], summary["baseline"]["time"]):
        assert time["batches_over_loads"] == time["batches"] > 0
        assert time["load_wait_s"] == pytest.approx([0.25 * time["batches"], 0.5 * time["batches"], 0, 0])
    metrics = result.cached.stats["metrics"]
    for name in ("write_backs_deferred", "evicted_unsaved_pages"):
        assert 0 < summary["time"][name] <= metrics[f"{name}_total"]
        assert summary["baseline"]["time"][name] == 0


def test_loads_declined_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SyncMover, "load_s", lambda mover, size: 1e6)
    monkeypatch.setattr(Pace, "token_s", lambda pace, now: 1e-6)
    monkeypatch.setattr(Pace, "line", lambda pace: Line())  # nobody had better be encoded in passing
    result = replay(small_trace(), tiny_model(), CPU, ReplayConfig(concurrency=2, verify=0, baseline_requests=0))
    time = summarise(result)["time"]
    assert time["loads_declined"] > 0
    assert time["load_s"] == 0
    assert time["load_gb_per_s"] is None


def test_host_memory_is_pinned_before_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[EngineConfig] = []
    make = Memory.__init__

    def noted(memory: Memory, config: EngineConfig, *args: Any, **options: Any) -> None:
        made.append(config)
        make(memory, config, *args, **options)

    monkeypatch.setattr(Memory, "__init__", noted)
    options = ReplayConfig(requests=8, verify=0, baseline_requests=0)
    result = replay(small_trace(), tiny_model(), replace(CPU, host_pinning="background"), options)
    assert [config.host_pinning for config in made] == ["wait"]
    assert summarise(result)["engine_config"]["host_pinning"] == "wait"


def test_counts_repeat_and_each_request_saw_its_own_history(result: ReplayResult) -> None:
    again = replay(small_trace(), tiny_model(), CPU, ReplayConfig(concurrency=1, verify=0, baseline_requests=0))
    rows = TraceRows(small_trace(), tiny_model().schema)
    assert np.array_equal(again.cached.position, result.cached.position)
    assert misplaced(again.cached, rows) == 0
    again.cached.position[3] += 1
    assert misplaced(again.cached, rows) == 1
    assert again.speedup is None
    assert summarise(again)["baseline"] is None


def test_the_share_of_padding_is_that_of_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every batch were padded to 64 rows, and the engine's first batch to 10,000 on top: the warm-up's."""
    start = Runner.start
    batches: list[int] = []

    def noted(
        runner: Runner, plan: BatchPlan, arrivals: Arrivals | None = None, early: EarlyLayers | None = None
    ) -> Done:
        batches.append(plan.rows)
        return start(runner, plan, arrivals, early)

    def stats(runner: Runner) -> dict[str, Any]:
        padded = sum(-rows % 64 for rows in batches) + (10_000 if batches else 0)
        return {"rows": sum(batches) + padded, "padded_rows": padded, "padded_rows_share": 0.99}

    monkeypatch.setattr(Runner, "start", noted)
    monkeypatch.setattr(Runner, "stats", stats)
    result = replay(small_trace(), tiny_model(), CPU, ReplayConfig(concurrency=1, verify=0, baseline_requests=0))
    measured = batches[-int(result.cached.counters["batches_total"]) :]
    padded = sum(-rows % 64 for rows in measured)
    assert summarise(result)["padded_rows_share"] == pytest.approx(padded / (sum(measured) + padded))


def test_open_loop_and_a_capped_baseline() -> None:
    options = ReplayConfig(speed=1e7, verify=2, verify_tokens=300, baseline_requests=10, requests=30)
    result = replay(small_trace(), tiny_model(), CPU, options)
    summary = summarise(result)
    assert summary["loop"] == {"mode": "open", "speed": 1e7}
    assert summary["speedup_of"] == "p50 latency"
    assert summary["speedup"] == pytest.approx(summary["baseline"]["latency_ms"]["p50"] / summary["latency_ms"]["p50"])
    assert summary["baseline"]["of_requests"] == 10
    assert (summary["requests"], summary["answered"]) == (30, 30)
    assert result.agreement.compared.requests == 10
    assert result.agreement.holds


def test_bfloat16_is_held_to_the_reference() -> None:
    result = replay(small_trace(), tiny_model(), replace(CPU, dtype="bfloat16"), ReplayConfig(verify=6))
    verified = result.agreement.verified
    assert result.agreement.tolerance is None
    assert verified.uncached is not None
    assert 1e-4 < verified.uncached.relative_l2 < 0.1
    assert result.agreement.holds, result.agreement.broken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_states_are_held_to_the_reference(dtype: str) -> None:
    """Tiers sized by the working set hold the same share of it, in half of the bytes or a quarter."""
    config = replace(CPU, dtype=dtype, gpu_format="fp8")
    result = replay(small_trace(), tiny_model(), config, ReplayConfig(verify=6))
    native = replay(small_trace(), tiny_model(), replace(CPU, dtype=dtype), ReplayConfig(baseline_requests=0, verify=0))
    assert result.working_set_bytes * {"float32": 4, "bfloat16": 2}[dtype] == native.working_set_bytes
    assert result.agreement.verified.cached.relative_l2 > 1e-3
    assert result.agreement.tolerance is None
    assert result.agreement.holds, result.agreement.broken


def test_a_broken_score_is_seen(result: ReplayResult) -> None:
    run, offsets = result.cached, result.cached.cand_offsets
    wrong = run.logits.copy()
    wrong[offsets[7], 1] += 0.25
    found = difference(wrong, run.logits, offsets)
    assert found.max_logit == pytest.approx(0.25, rel=1e-4)
    assert 0 < found.relative_l2 < found.max_relative_l2
    verified = result.agreement.verified
    assert not judge("float32", found, verified, 0, 0).holds
    assert not judge("float32", Difference(), verified, 1, 0).holds
    assert not judge("float32", Difference(), verified, 0, 1).holds
    assert judge("float32", Difference(), verified, 0, 0).holds
    nan = difference(np.full_like(wrong, np.nan), run.logits, offsets)
    assert not judge("float32", nan, verified, 0, 0).holds


def test_shorter_types_may_be_a_fifth_further_from_fp32_and_small_samples_further() -> None:
    def verdict(cached: float, uncached: float, apart: float, requests: int = 10**8) -> bool:
        pair = Verification(requests, 0, 10, Difference(3, relative_l2=cached), Difference(3, relative_l2=uncached))
        return judge("bfloat16", Difference(3, max_score=0.01, relative_l2=apart), pair, 0, 0).holds

    assert verdict(1.19e-3, 1e-3, 0.0)
    assert not verdict(1.21e-3, 1e-3, 0.0)
    assert verdict(1.79e-3, 1e-3, 0.0, requests=4)
    assert not verdict(1.81e-3, 1e-3, 0.0, requests=4)
    assert verdict(1e-3, 1e-3, 2.19e-3)
    assert not verdict(1e-3, 1e-3, 2.21e-3)
    assert not verdict(1e-3, 1e-3, float("nan"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lossy_host_format_may_add_its_error(dtype: str) -> None:
    def verdict(cached: float, host_format: str, uncached: float | None = 1e-3) -> bool:
        without = None if uncached is None else Difference(3, relative_l2=uncached)
        pair = Verification(10**8, 0, 10, Difference(3, relative_l2=cached), without)
        return judge(dtype, Difference(3, max_score=0.01), pair, 0, 0, host_format).holds

    for host_format, added in FORMAT_ERRORS.items():
        if host_format != "kv":
            assert verdict(1.2e-3 + 0.99 * added, host_format)
            assert not verdict(1.2e-3 + 1.01 * added, host_format)
            assert not verdict(float("nan"), host_format)
            assert verdict(1.01 * added, host_format, None) == (
                dtype == "bfloat16"
            )  # without a baseline nothing is known


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_states_may_add_their_error(dtype: str) -> None:
    def holds(cached: float) -> bool:
        pair = Verification(10**8, 0, 10, Difference(3, relative_l2=cached), Difference(3, relative_l2=1e-3))
        return judge(dtype, Difference(3, max_score=0.01), pair, 0, 0, "kv", "fp8").holds

    added = GPU_FORMAT_ERRORS["fp8"]
    assert holds(1.2e-3 + 0.99 * added)
    assert not holds(1.2e-3 + 1.01 * added)
    assert not holds(float("nan"))


def test_what_does_not_fit_is_refused() -> None:
    trace, model = small_trace(), tiny_model()
    cases = [
        (replace(CPU, cache="off"), ReplayConfig(), "cache"),
        (replace(CPU, max_candidates=2), ReplayConfig(), "max_candidates"),
        (replace(CPU, max_queue=8), ReplayConfig(concurrency=5), "concurrency"),
        (replace(CPU, gpu_cache="x%ws"), ReplayConfig(), "gpu_cache"),
        (replace(CPU, host_cache="99999%ws"), ReplayConfig(), "host_cache"),
    ]
    for engine, options, field in cases:
        with pytest.raises(InvalidArgument, match=f"^{field}: "):
            replay(trace, model, engine, options)
    with pytest.raises(InvalidArgument, match="trace: the trace has no request"):
        replay(trace.first(0), model, CPU, ReplayConfig())


def test_the_adapter_fills_what_the_schema_has_and_wants_an_item() -> None:
    trace = small_trace()
    rows = TraceRows(trace, tiny_model().schema)
    request = trace.request(5)
    candidates = rows.candidates(request)
    assert np.array_equal(candidates["item"], request.cand)
    assert (candidates["time_ms"] == request.t_ms).all()
    assert ((candidates["category"] >= 0) & (candidates["category"] < CATEGORIES)).all()
    history = rows.history(0)
    assert (history["action"] == 1).all()
    same = {int(row["item"]): int(row["category"]) for row in history}
    assert all(same[int(row["item"])] == int(row["category"]) for row in history)
    assert np.array_equal(rows.user(0), TraceRows(trace, tiny_model().schema).user(0))
    assert rows.user(0).tobytes() != rows.user(1).tobytes()
    bare = FeatureSchema((), (Feature("item", buckets=64, dim=8),), (Feature("item", buckets=64, dim=8),))
    bare_rows = TraceRows(trace, bare)
    assert bare_rows.history(0).dtype.names == ("time_ms", "item")
    model = initialise(RankingModel(ModelConfig(), bare), 0)
    assert replay(trace, model, CPU, ReplayConfig(requests=12, verify=2)).agreement.holds
    other = FeatureSchema((), (Feature("product", buckets=64, dim=8),), (Feature("product", buckets=64, dim=8),))
    with pytest.raises(InvalidArgument, match=r"'item'.*product"):
        TraceRows(trace, other)


def test_history_at_a_request_is_the_history_and_every_earlier_click() -> None:
    trace = small_trace()
    rows = TraceRows(trace, tiny_model().schema)
    for index in (0, 17, trace.requests - 1):
        user, grown = trace.request(index).user, list(trace.history(int(trace.user[index])).items)
        for earlier in trace.iter_requests(0, index):
            grown += list(earlier.clicked) if earlier.user == user else []
        assert rows.history_at(index).behaviours["item"].tolist() == grown
        assert len(grown) == trace.prefix_lengths()[index]


def test_working_set_counts_pages_of_final_states() -> None:
    model = ModelConfig(max_history=100, max_realtime=10)
    user = np.array([0, 2, 2], dtype=np.int32)
    positions = np.array([13, 50, 130], dtype=np.int64)
    # User 0: 3 + 13 tokens, one page of 16. User 1 never asks. User 2: of 130, 30 are dropped; 103 tokens, 7 pages.
    assert working_set_pages(user, positions, model, 3, 16) == 1 + 7
    assert resolve_capacity("50%ws", 8, 4096, "gpu_cache") == str(4 * 4096)
    assert resolve_capacity("51 %ws", 8, 4096, "gpu_cache") == str(5 * 4096)
    assert resolve_capacity("0.1%ws", 8, 4096, "gpu_cache") == "4096"
    assert resolve_capacity("0%ws", 8, 4096, "host_cache") == "0"
    assert resolve_capacity("64MiB", 8, 4096, "gpu_cache") == "64MiB"


@pytest.mark.parametrize(("host_cache", "kept"), [("50%ws", "x8"), ("0%ws", "kv"), ("0", "kv"), ("0%", "kv")])
def test_without_a_host_tier_no_format_may_add_its_error(host_cache: str, kept: str) -> None:
    trace, model = small_trace(), tiny_model()
    asked = replace(CPU, host_cache=host_cache, host_format="x8")
    assert size_tiers(TraceRows(trace, model.schema), model, asked)[1].host_format == kept


def test_the_whole_working_set_evicts_nothing() -> None:
    trace, model = small_trace(), tiny_model()
    bytes_, engine = size_tiers(TraceRows(trace, model.schema), model, replace(CPU, gpu_cache="100%ws"))
    assert engine.gpu_cache == str(bytes_)
    result = replay(
        trace, model, replace(CPU, gpu_cache="100%ws", host_cache="0"), ReplayConfig(concurrency=1, verify=0)
    )
    assert result.cached.counters["evicted_pages_gpu"] == 0
    # Nothing is ever lost, so that only a user's first request can be cold.
    assert ((result.cached.tier == 2) == repeats(trace, trace.requests)).all()


def test_the_drawing_of_the_time_has_a_piece_a_phase(result: ReplayResult) -> None:
    pytest.importorskip("matplotlib")
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots()
    time_by_phase(axes, result)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(PHASES)
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    ours = ["batches under way", "loads under way", "stores under way"]
    assert [name.partition(",")[0] for name in names] == ["with cache", *ours, "without cache", *ours[:1]]
    bars = [bar.patches[0].get_width() for bar in axes.containers]
    loop = np.array(list(summarise(result)["time"]["loop"].values()))
    assert bars[: len(PHASES)] == pytest.approx(loop / result.cached.seconds)
    assert bars[len(PHASES) + 1] == pytest.approx(result.cached.counters["batches_s"] / result.cached.seconds)
    pyplot.close(figure)


def test_plots_are_images(result: ReplayResult, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    paths = write_report(result, tmp_path / "plots")
    names = {"latency_cdf.png", "hit_ratio.png", "tokens_by_tier.png", "memory.png", "time.png"}
    assert {path.name for path in paths} == names
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 600
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="report"):
        write_report(result, tmp_path / "file")
