"""The truth has a witness: the recompute of a one-layer model is also worked out here in numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_models import SCHEMA, START_MS, make_behaviours, make_candidates, make_features, small_model

from mtserve.model.embedding import table_salt
from mtserve.model.ranking import RankingModel
from mtserve.model.reference import recompute
from mtserve.types import History, Rows

MASK = (1 << 64) - 1


def _silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def _row_of(value: int, table: str, buckets: int) -> int:
    z = (((value & MASK) ^ table_salt(table)) + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) % buckets


class Witness:
    """Every weight as float64 by its name; one layer, one head."""

    def __init__(self, model: RankingModel) -> None:
        self.w = {name: parameter.numpy().astype(np.float64) for name, parameter in model.named_parameters()}
        self.gate_first = model.config.gate_first

    def token(self, prefix: str, features: Any, row: Any) -> Any:
        parts = []
        for feature in features:
            if feature.kind == "dense":
                parts.append(row[feature.name].astype(np.float64))
            else:
                table = self.w[f"tables.tables.{feature.table}"]
                parts.append(table[_row_of(int(row[feature.name]), feature.table, len(table))])
        hidden = np.concatenate(parts) @ self.w[f"{prefix}.input.weight"].T + self.w[f"{prefix}.input.bias"]
        return _silu(hidden) @ self.w[f"{prefix}.output.weight"].T + self.w[f"{prefix}.output.bias"]

    def norm(self, x: Any, name: str, group: int) -> Any:
        centred = x - x.mean()
        unit = centred / np.sqrt((centred**2).mean() + 1e-6)
        return unit * self.w[f"layers.0.{name}_weight"][group] + self.w[f"layers.0.{name}_bias"][group]

    def layer(self, tokens: list[Any], groups: list[int], sees: list[list[int]], head_dim: int, n: int) -> list[Any]:
        mixed = []
        for x, group in zip(tokens, groups, strict=True):
            product = self.norm(x, "norm", group) @ self.w["layers.0.uvqk_weight"] + self.w["layers.0.uvqk_bias"]
            mixed.append(np.split(_silu(product), 4))
        out = []
        for i, x in enumerate(tokens):
            u, _, q, _ = mixed[i]
            y = np.zeros(head_dim)
            for j in sees[i]:
                y += _silu(q @ mixed[j][3] / np.sqrt(head_dim)) / n * mixed[j][1]
            gated = self.norm(y * u, "gate", groups[i]) if self.gate_first else self.norm(y, "gate", groups[i]) * u
            out.append(x + gated @ self.w["layers.0.output_weight"] + self.w["layers.0.output_bias"])
        return out

    def logit(self, task: str, x: Any) -> float:
        hidden = _silu(x @ self.w[f"heads.{task}.0.weight"].T + self.w[f"heads.{task}.0.bias"])
        return float((hidden @ self.w[f"heads.{task}.2.weight"].T + self.w[f"heads.{task}.2.bias"])[0])


def _history(rng: np.random.Generator) -> tuple[Rows, Rows, Rows]:
    """Four behaviours, of which two are static, and candidates exposed before the last, at it, and after it."""
    rows = make_behaviours(rng, 4)
    rows["time_ms"] = START_MS + np.array([0, 1_000, 90_000, 7_200_000])
    candidates = make_candidates(rng, 3, START_MS + np.array([60_000, 7_200_000, 7_201_000]))
    return make_features(rng), rows, candidates


@pytest.mark.parametrize("gate_first", [False, True])
def test_the_reference_equals_a_calculation_by_hand(gate_first: bool) -> None:
    model = small_model(3, layers=1, heads=1, max_history=4, max_realtime=2, gate_first=gate_first)
    features, rows, candidates = _history(np.random.default_rng(11))
    witness = Witness(model)
    w = witness.w
    tokens = [witness.token(f"user_tokens.{i}", (feature,), features[0]) for i, feature in enumerate(SCHEMA.user)]
    # Gaps of 0 (the first), 1 s, 89 s and 7110 s; two buckets an octave of 1 + seconds. All in 1.7e12 ms's hour of week.
    hour = START_MS // 3_600_000 % 168
    for position, (row, gap, hours) in enumerate(zip(rows, [0, 2, 12, 25], [0, 0, 0, 2], strict=True)):
        token = witness.token("behaviour_token", SCHEMA.behaviour, row)
        tokens.append(token + w["position"][position] + w["gap"][gap] + w["hour"][hour + hours])
    # They see 2, 3 and 4 behaviours, the last of them 59 s, 7110 s and 1 s ago.
    for row, recency, hours in zip(candidates, [11, 25, 2], [0, 2, 2], strict=True):
        token = witness.token("candidate_token", SCHEMA.candidate, row)
        tokens.append(token + w["recency"][recency] + w["hour"][hour + hours])
    groups = [0, 0, 1, 1, 2, 2, 3, 3, 3]
    static = [0, 1, 2, 3]
    sees = [static, static, static, static, [*static, 4], [*static, 4, 5]]
    sees += [[*static, 6], [*static, 4, 7], [*static, 4, 5, 8]]
    out = witness.layer(tokens, groups, sees, head_dim=8, n=8)
    expected = [[witness.logit(task, x) for task in ("ctr", "ctcvr")] for x in out[6:]]
    got = recompute(model, History(features, 0, rows), candidates).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_positions_count_from_the_first_behaviour_that_is_kept() -> None:
    model = small_model(max_history=4, max_realtime=2)
    features, rows, candidates = _history(np.random.default_rng(12))
    before = make_behaviours(np.random.default_rng(13), 40, 0)
    before["time_ms"] = START_MS - 1000
    whole = History(features, 0, np.concatenate((before, rows)))
    alone = History(features, 40, rows)
    assert np.array_equal(recompute(model, whole, candidates), recompute(model, alone, candidates))
