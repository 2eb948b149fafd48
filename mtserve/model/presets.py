"""Named model shapes and a default feature schema, so that everything runs before a team brings its own."""

from __future__ import annotations

from mtserve.config import ModelConfig
from mtserve.errors import InvalidArgument
from mtserve.model.ranking import RankingModel
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.model.weights import initialise


def _mtgr(name: str, layers: int, d: int, heads: int) -> ModelConfig:
    return ModelConfig(
        name=name, layers=layers, d=d, heads=heads, head_dim=256,
        max_history=1100, max_realtime=100, attention_length=1024,
    )  # fmt: skip


def _hstu(name: str, d: int, head_dim: int, max_history: int) -> ModelConfig:
    return ModelConfig(
        name=name, layers=8, d=d, heads=4, head_dim=head_dim,
        max_history=max_history, max_realtime=max_history, attention_length=max_history,
        static_history=False, static_attention="causal",
    )  # fmt: skip


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    "mtgr-small": _mtgr("mtgr-small", layers=3, d=512, heads=2),
    "mtgr-middle": _mtgr("mtgr-middle", layers=5, d=768, heads=3),
    "mtgr-large": _mtgr("mtgr-large", layers=15, d=768, heads=3),
    "hstu-512": _hstu("hstu-512", d=512, head_dim=128, max_history=8192),
    "hstu-1024": _hstu("hstu-1024", d=1024, head_dim=256, max_history=8192),
    "kuairand": _hstu("kuairand", d=1024, head_dim=128, max_history=20_000),
}


def default_schema(*, item_buckets: int = 100_000, dim: int = 64) -> FeatureSchema:
    """Items with a category and an action; candidates with user-item statistics and the page's surface."""
    item = Feature("item", buckets=item_buckets, dim=dim)
    category = Feature("category", buckets=max(2, item_buckets // 100), dim=dim // 2)
    return FeatureSchema(
        user=(
            Feature("segment", buckets=1024, dim=dim // 2),
            Feature("country", buckets=256, dim=dim // 4),
            Feature("activity", kind="dense", width=2),
        ),
        behaviour=(
            item,
            category,
            Feature("action", buckets=16, dim=dim // 4),
            Feature("dwell", kind="dense", width=1),
        ),
        candidate=(
            item,
            category,
            Feature("affinity", kind="dense", width=4, role="cross"),
            Feature("surface", buckets=64, dim=dim // 4, role="context"),
        ),
    )


def preset(name: str) -> ModelConfig:
    """The configuration called `name`. Raises InvalidArgument listing the known ones."""
    if name not in PRESETS:
        raise InvalidArgument(f"{name!r} is not one of {', '.join(PRESETS)}", field="model")
    return PRESETS[name]


def build(name: str, *, seed: int = 0, schema: FeatureSchema | None = None) -> RankingModel:
    """A seeded, untrained model of preset `name`, float32 on the CPU."""
    config = preset(name)
    if schema is None:
        schema = default_schema(item_buckets=1000, dim=16) if name == "tiny" else default_schema()
    return initialise(RankingModel(config, schema), seed)
