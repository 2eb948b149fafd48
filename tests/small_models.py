"""Small models with every kind of feature, and rows for them: cheap enough to recompute after each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mtserve.config import ModelConfig
from mtserve.model.ranking import RankingModel
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.model.weights import initialise
from mtserve.types import Rows

torch.set_num_threads(1)

ITEM = Feature("item", buckets=53, dim=6)
SCHEMA = FeatureSchema(
    user=(Feature("segment", buckets=11, dim=4), Feature("activity", kind="dense", width=2)),
    behaviour=(ITEM, Feature("dwell", kind="dense", width=1)),
    candidate=(
        ITEM,
        Feature("affinity", kind="dense", width=2, role="cross"),
        Feature("surface", buckets=5, dim=3, role="context"),
    ),
)
BARE_SCHEMA = FeatureSchema(user=(), behaviour=(ITEM,), candidate=(ITEM,))
CAUSAL: dict[str, Any] = {"static_history": False, "static_attention": "causal"}
START_MS = 1_700_000_000_000


def small_config(**changes: Any) -> ModelConfig:
    """Two layers; the short attention length makes every behaviour weigh enough to be noticed."""
    shape = {"layers": 2, "d": 16, "heads": 2, "head_dim": 8, "max_history": 40, "max_realtime": 10}
    return ModelConfig(**{**shape, "attention_length": 8, **changes})


def small_model(seed: int = 0, schema: FeatureSchema = SCHEMA, **changes: Any) -> RankingModel:
    return initialise(RankingModel(small_config(**changes), schema), seed)


def make_behaviours(
    rng: np.random.Generator, count: int, after_ms: int = START_MS, schema: FeatureSchema = SCHEMA
) -> Rows:
    """`count` behaviours at times from `after_ms` on, some equal, some hours apart."""
    rows = np.zeros(count, schema.behaviour_dtype)
    gaps = rng.choice([0, 300, 40_000, 5_000_000], count)
    rows["time_ms"] = after_ms + np.cumsum(gaps)
    fill(rng, rows)
    return rows


def make_candidates(rng: np.random.Generator, count: int, time_ms: Any = -1, schema: FeatureSchema = SCHEMA) -> Rows:
    rows = np.zeros(count, schema.candidate_dtype)
    fill(rng, rows)
    rows["time_ms"] = time_ms
    return rows


def make_features(rng: np.random.Generator, schema: FeatureSchema = SCHEMA) -> Rows:
    rows = np.zeros(1, schema.user_dtype)
    fill(rng, rows)
    return rows


def fill(rng: np.random.Generator, rows: Rows) -> None:
    """Random ids and values in every feature of `rows`; times stay."""
    for name in rows.dtype.names or ():
        if name == "time_ms":
            continue
        shape = rows[name].shape
        dense = rows[name].dtype.kind == "f"
        rows[name] = rng.standard_normal(shape) if dense else rng.integers(-(2**62), 2**62, shape)
