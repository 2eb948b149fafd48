"""Tokens, ablations, presets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import SCHEMA, START_MS, make_behaviours, make_candidates, make_features, small_model

from mtserve.errors import InvalidArgument
from mtserve.model.embedding import hash_ids, table_salt
from mtserve.model.presets import PRESETS, build, default_schema, preset
from mtserve.model.reference import recompute
from mtserve.model.tokeniser import GAP_BUCKETS, GAP_THRESHOLDS_MS, gap_buckets, hours_of_week
from mtserve.types import History


def _logits(**changes: Any) -> np.ndarray:  # type: ignore[type-arg]
    rng = np.random.default_rng(5)
    history = History(make_features(rng), 0, make_behaviours(rng, 17))
    return recompute(small_model(**changes), history, make_candidates(rng, 4, START_MS * 2)).numpy()


def test_gaps_have_two_buckets_an_octave_of_seconds() -> None:
    gaps = np.array([-5, 0, 414, 415, 999, 1000, 3000, 7000, 2**62])
    assert gap_buckets(gaps).tolist() == [0, 0, 0, 1, 1, 2, 4, 6, GAP_BUCKETS - 1]
    rng = np.random.default_rng(1)
    near = (GAP_THRESHOLDS_MS[:, None] + np.arange(-2, 3)).ravel()
    for each in (near, rng.integers(0, 10**7, 20_000), (2.0 ** rng.uniform(0, 62, 20_000)).astype(np.int64)):
        formula = np.minimum(2 * np.log2(1 + np.maximum(each, 0) / 1000), GAP_BUCKETS - 1).astype(np.int64)
        assert np.array_equal(gap_buckets(each), formula)
    grown = gap_buckets(np.sort(np.random.default_rng(0).integers(0, 2**45, 1000)))
    assert (np.diff(grown) >= 0).all()
    assert grown.max() < GAP_BUCKETS


def test_hours_count_from_the_epochs_thursday() -> None:
    hour = 3_600_000
    assert hours_of_week(np.array([0, hour - 1, hour, 167 * hour, 168 * hour])).tolist() == [0, 0, 1, 167, 0]
    assert hours_of_week(np.array([1_700_000_000_000])).tolist() == [1_700_000_000_000 // hour % 168]


def test_hashes_never_change() -> None:
    """Golden values: trained tables depend on them."""
    ids = np.array([0, 1, -1, 2**63 - 1, -(2**63), 123456789])
    assert table_salt("item") == 15634484697162812036
    assert table_salt("category") == 5582399695216075299
    assert hash_ids(ids, table_salt("item"), 1000).tolist() == [414, 504, 467, 210, 687, 397]
    expected = [2065550767, 151149761, 459615264, 771989159, 313127899, 1038841465]
    assert hash_ids(ids, 0, 2**31).tolist() == expected


def test_hashes_fill_their_buckets_evenly() -> None:
    counts = np.bincount(hash_ids(np.arange(100_000), table_salt("item"), 50), minlength=50)
    assert counts.min() > 1800
    assert counts.max() < 2200


def test_without_cross_features_they_have_neither_weights_nor_influence() -> None:
    model = small_model(cross_features=False)
    assert [feature.name for feature in model.candidate_token.features] == ["item", "surface"]
    assert small_model().candidate_token.input.in_features - model.candidate_token.input.in_features == 2
    rng = np.random.default_rng(1)
    history = History(None, 0, make_behaviours(rng, 5))
    candidates = make_candidates(rng, 3, START_MS * 2)
    other = candidates.copy()
    other["affinity"] += 1
    assert torch.equal(recompute(model, history, candidates), recompute(model, history, other))
    assert not torch.equal(recompute(small_model(), history, candidates), recompute(small_model(), history, other))


def test_plain_norm_is_group_norm_whose_groups_agree() -> None:
    plain, grouped = small_model(norm="plain"), small_model()
    assert plain.layers[0].norm_weight.shape == (1, 16)
    assert grouped.layers[0].norm_weight.shape == (4, 16)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in grouped.named_parameters():
            parameter.copy_(weights[name].expand(parameter.shape))
    rng = np.random.default_rng(5)
    history = History(make_features(rng), 0, make_behaviours(rng, 17))
    candidates = make_candidates(rng, 4, START_MS * 2)
    torch.testing.assert_close(recompute(plain, history, candidates), recompute(grouped, history, candidates))


@pytest.mark.parametrize(
    "changes", [{"gate_first": True}, {"norm": "plain"}, {"static_attention": "causal"}, {"attention_length": 9}]
)
def test_ablations_change_the_scores(changes: dict[str, Any]) -> None:
    # The norm after attention takes most of a constant factor out again, hence so little for the length.
    assert np.abs(_logits() - _logits(**changes)).max() > 5e-5


def test_presets_are_as_published() -> None:
    shapes = {
        name: (c.layers, c.d, c.heads, c.head_dim, c.max_history, c.max_realtime, c.attention_length)
        for name, c in PRESETS.items()
    }
    assert shapes == {
        "tiny": (2, 32, 2, 16, 256, 32, 256),
        "mtgr-small": (3, 512, 2, 256, 1100, 100, 1024),
        "mtgr-middle": (5, 768, 3, 256, 1100, 100, 1024),
        "mtgr-large": (15, 768, 3, 256, 1100, 100, 1024),
        "hstu-512": (8, 512, 4, 128, 8192, 8192, 8192),
        "hstu-1024": (8, 1024, 4, 256, 8192, 8192, 8192),
        "kuairand": (8, 1024, 4, 128, 20_000, 20_000, 20_000),
    }
    for name, config in PRESETS.items():
        causal = name.startswith(("hstu", "kuairand"))
        assert config.name == name
        assert (config.static_history, config.static_attention) == (not causal, "causal" if causal else "full")
    assert PRESETS["kuairand"].state_values_per_token == 2 * 8 * 4 * 128
    with pytest.raises(InvalidArgument, match="mtgr-small"):
        preset("mtgr-tiny")


def test_a_preset_builds_with_its_schema_and_seed() -> None:
    first, again, other = build("tiny", seed=1), build("tiny", seed=1), build("tiny", seed=2)
    assert first.schema == default_schema(item_buckets=1000, dim=16)
    assert build("tiny", schema=SCHEMA).schema is SCHEMA
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        assert not torch.equal(parameter, dict(other.named_parameters())[name]), name
        assert not parameter.requires_grad


def test_every_part_of_the_model_reaches_the_scores() -> None:
    """A parameter that nothing depends on would not be noticed when a kernel forgets it."""
    rng = np.random.default_rng(6)
    model = small_model(max_history=18, max_realtime=9)
    history = History(make_features(rng), 0, make_behaviours(rng, 17))
    candidates = make_candidates(rng, 30, START_MS + rng.integers(0, 10**8, 30))
    before = recompute(model, history, candidates)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn(kept.shape, generator=torch.Generator().manual_seed(0)))
        assert not torch.equal(recompute(model, history, candidates), before), name
        with torch.no_grad():
            parameter.copy_(kept)
    assert torch.equal(recompute(model, history, candidates), before)
