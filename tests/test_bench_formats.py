"""The arithmetic that the quality benchmark of the host formats rests on."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mtserve.config import ModelConfig
from mtserve.kernels.backend import load_kernels
from mtserve.model.ranking import RankingModel
from mtserve.model.reference import recompute
from mtserve.model.weights import initialise
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.replay.features import TraceRows

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ranking_metrics")


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("row_formats")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("trained_model")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_formats")


def test_auc_counts_pairs_and_ties_half(metrics: ModuleType) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 12, 57).astype(np.float32), rng.random(57) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert metrics.auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert metrics.auc(labels.astype(np.float32), labels) == 1.0
    assert metrics.auc(np.zeros(57, np.float32), labels) == 0.5


@pytest.mark.parametrize("label", [True, False])
def test_auc_needs_both_labels(metrics: ModuleType, label: bool) -> None:
    with pytest.raises(ValueError, match="needs one of each"):
        metrics.auc(np.arange(3.0), np.full(3, label))


def test_kendall_tau_counts_pairs(metrics: ModuleType) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 9, (2, 31)).astype(np.float32)
    first, second = np.array(list(itertools.combinations(range(31), 2))).T
    left, right = (np.sign(scores[first] - scores[second]) for scores in (ours, theirs))
    expected = (left * right).sum() / np.sqrt((left != 0).sum() * (right != 0).sum())
    assert metrics.kendall_tau(ours, theirs) == pytest.approx(expected)


def test_kendall_tau_of_known_orders(metrics: ModuleType) -> None:
    order = np.arange(7.0)
    assert metrics.kendall_tau(order, np.exp(order)) == pytest.approx(1.0)
    assert metrics.kendall_tau(order, -order) == pytest.approx(-1.0)
    swapped = np.array([1.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert metrics.kendall_tau(swapped, order) == pytest.approx(1 - 2 / 21)
    with pytest.raises(ValueError, match="all equal"):
        metrics.kendall_tau(order, np.zeros(7))


ERRORS = {"kv": 2e-3, "kv8": 8e-3, "x8": 8e-3, "x4": 0.12, "gpu fp8": 0.04, "kv fp8": 0.03, "x fp8": 0.03}


def normal_values(form: Any, seed: int) -> torch.Tensor:
    """What the host would keep of 2 layers and 17 tokens, d 128, 2 heads of 64."""
    shape = (2, 17, 128) if form.of_input else (2, 17, 2, 2, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_codecs_keep_normal_values_within_their_error(formats: ModuleType) -> None:
    assert [form.name for form in formats.FORMATS] == list(ERRORS)
    for form in formats.FORMATS:
        values = normal_values(form, 2)
        error = ((form.codec(values) - values).norm() / values.norm()).item()
        assert ERRORS[form.name] / 4 < error < ERRORS[form.name], form.name


def test_codecs_give_the_same_again_and_token_by_token(formats: ModuleType) -> None:
    for form in formats.FORMATS:
        values = normal_values(form, 3)
        once = form.codec(values)
        torch.testing.assert_close(form.codec(once), once, rtol=1e-6, atol=0)
        one_by_one = torch.cat([form.codec(token) for token in values.split(1, dim=1)], dim=1)
        assert torch.equal(one_by_one, once), form.name


def test_codecs_keep_zeros_signs_and_the_largest(formats: ModuleType) -> None:
    for form in (*formats.FORMATS, *formats.LOSSLESS):
        values = torch.zeros_like(normal_values(form, 0))
        values[0, 2, ..., 5], values[1, 3, ..., 7], values[1, 3, ..., 8] = -3.0, 2.0, -2.0
        torch.testing.assert_close(form.codec(values), values, rtol=1e-6, atol=0)


def test_bytes_of_a_token_and_layer(formats: ModuleType) -> None:
    config = ModelConfig(d=512, heads=4, head_dim=128)
    sizes = {form.name: form.layer_bytes(config) for form in formats.FORMATS}
    assert sizes == {"kv": 2048, "kv8": 1040, "x8": 514, "x4": 288, "gpu fp8": 1024, "kv fp8": 1056, "x fp8": 516}


def test_broken_bounds_are_named(bench: ModuleType, formats: ModuleType) -> None:
    x4 = next(form for form in formats.FORMATS if form.name == "x4")
    good = bench.Quality("x4", 288, 1.4e-2, 0.0, 0.0, 0.991, 0.5, 0.75, -9e-4, {50: 1.5e-2})
    assert bench.broken(good, x4) == []
    bad = bench.Quality("x4", 288, float("nan"), 0.0, 0.0, 0.989, 0.5, 0.75, -1.1e-3, {10: 1e-2, 50: 1.6e-2})
    lines = bench.broken(bad, x4)
    assert [line.split(" is ")[0].split(" by ")[0] for line in lines] == [
        "x4: relative L2", "x4: relative L2 after 50 cycles", "x4: Kendall tau", "x4: AUC changes",
    ]  # fmt: skip


def small_sample(trained: ModuleType) -> tuple[RankingModel, Any]:
    """An untrained small model and a sample with 64 behaviours in S and more than 16 in R."""
    config = ModelConfig(layers=2, d=32, heads=2, head_dim=16, max_history=128, max_realtime=64, attention_length=16)
    trace = generate(
        replace(trained.TRACE, users=1, requests=2, history_median=90, history_sigma=0.0, candidates_mean=9,
                clicks_mean=4, items=40, categories=5, seed=1)
    )  # fmt: skip
    rows = TraceRows(trace, trained.SCHEMA)
    model = initialise(RankingModel(replace(config, tasks=("ctr",)), trained.SCHEMA), 0)
    (sample,) = trained.samples(rows, range(1), model.config)
    groups = trained.tokens_of(model, sample.history, sample.candidates).groups
    assert groups.static == 64 and groups.realtime > 16 and len(sample.offsets) == 3
    return model, sample


def test_a_forward_over_a_restored_prefix_is_exact_and_feels_a_change(bench: ModuleType, trained: ModuleType) -> None:
    model, sample = small_sample(trained)
    with torch.inference_mode():
        bench.check(model, sample)
        form = bench.LOSSLESS[0]
        exact, (restored, zeros) = bench.score_formats(model, sample, (form, bench.NOTHING))
    np.testing.assert_allclose(restored, exact, rtol=0, atol=1e-5)
    assert np.abs(zeros - exact).max() > 1e-2


def test_a_pass_through_fp8_pages_is_near_the_exact_one_however_it_is_cut(
    bench: ModuleType, formats: ModuleType, trained: ModuleType
) -> None:
    model, sample = small_sample(trained)
    form = next(form for form in formats.FORMATS if form.name == "gpu fp8")
    with torch.inference_mode():
        exact, (whole,) = bench.score_formats(model, sample, (form,))
        tokens = trained.tokens_of(model, sample.history, sample.candidates)
        _, states = bench.forward(model, tokens, pages=form.pages)
        cut = bench.forward(model, tokens, states.kv[:, :80], form, form.pages)[0]
    assert 1e-4 < np.linalg.norm(whole - exact) / np.linalg.norm(exact) < 0.05
    np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-3)


def test_training_gradients_are_those_of_the_full_recompute(trained: ModuleType) -> None:
    model, sample = small_sample(trained)
    found = []
    for logits_of in (
        lambda: trained.logits_of(model, sample, load_kernels("eager")),
        lambda: recompute(model, sample.history, sample.candidates)[:, 0],
    ):
        model.requires_grad_(True).zero_grad()
        logits_of().square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, truth = found
    assert eager.keys() == truth.keys()
    for name, gradient in truth.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(eager[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)
