"""The two ends of the forward on the GPU's kernels against the model's own: tokenisers, added tables, heads."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton")

from small_models import BARE_SCHEMA, SCHEMA, small_model
from token_batches import NAN, Made, make_token_batch, random_rows

from mtserve.engine.forward.heads import TaskHeads
from mtserve.engine.forward.tokens import TokenEmbedding
from mtserve.errors import InvalidArgument
from mtserve.model.ranking import RankingModel
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.model.tokeniser import GAP_BUCKETS, Tokeniser, hours_of_week
from mtserve.types import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 64
WIDE = FeatureSchema(
    user=(
        Feature("city", buckets=1_000, dim=17),
        Feature("age", kind="dense", width=1),
        Feature("shop", buckets=31, dim=70, table="shops"),
    ),
    behaviour=(Feature("item", buckets=101, dim=33), Feature("seller", buckets=31, dim=70, table="shops")),
    candidate=(
        Feature("item", buckets=101, dim=33),
        Feature("clicks", kind="dense", width=5, role="cross"),
        Feature("again", buckets=101, dim=33, table="item", role="cross"),
        Feature("shop", buckets=31, dim=70, table="shops"),
        Feature("hour", kind="dense", width=2, role="context"),
    ),
)


def _model(schema: FeatureSchema, **changes: object) -> RankingModel:
    return small_model(3, schema, d=D, **changes).to(DEVICE)


def _rows(model: RankingModel, counts: list[int], seed: int) -> list[Rows]:
    """Feature rows of each kind; a kind of user token takes a user's whole row."""
    schema, rng = model.schema, np.random.default_rng(seed)
    dtypes = [*(schema.user_dtype for _ in schema.user), schema.behaviour_dtype, schema.candidate_dtype]
    return [random_rows(rng, dtype, count) for dtype, count in zip(dtypes, counts, strict=True)]


def _batch(model: RankingModel, rows: list[Rows], seed: int) -> Made:
    rng, positions = np.random.default_rng(seed), model.config.max_history
    capacity = sum(map(len, rows)) + 3
    return make_token_batch(rng, rows, capacity, positions=positions, buckets=GAP_BUCKETS, device=DEVICE)


def _expected(model: RankingModel, rows: list[Rows], made: Made) -> torch.Tensor:
    """[rows, d], NaN where no token goes: the tokenisers, and the tables added, kind by kind."""
    x = torch.full((len(made.batch.row), D), NAN, device=DEVICE)
    tokenisers = [*model.user_tokens, model.behaviour_token, model.candidate_token]
    for kind, tokeniser in enumerate(tokenisers):
        assert isinstance(tokeniser, Tokeniser)
        columns = [torch.from_numpy(column).to(DEVICE) for column in tokeniser.feed(rows[kind], model.tables)]
        tokens = tokeniser(columns, model.tables)
        mine = slice(made.first[kind], made.first[kind + 1])
        position, bucket = made.batch.position[mine].long(), made.batch.bucket[mine].long()
        if kind >= len(model.user_tokens):
            hour = torch.from_numpy(hours_of_week(rows[kind]["time_ms"])).to(DEVICE)
            behaviours = kind == len(model.user_tokens)
            relative = model.position[position] + model.gap[bucket] if behaviours else model.recency[bucket]
            tokens = tokens + relative + model.hour[hour]
        x[made.rows(kind).to(DEVICE)] = tokens
    return x


@pytest.mark.parametrize(
    ("schema", "counts", "changes"),
    [
        (WIDE, [3, 1, 2, 9, 40], {}),
        (WIDE, [0, 0, 2, 0, 130], {"cross_features": False}),
        (SCHEMA, [2, 2, 131, 0], {}),
        (SCHEMA, [0, 5, 3, 20], {"cross_features": False}),
        (BARE_SCHEMA, [7, 30], {}),
    ],
)
@torch.inference_mode()
def test_tokens_equal_the_models(schema: FeatureSchema, counts: list[int], changes: dict[str, object]) -> None:
    model = _model(schema, **changes)
    tokens = TokenEmbedding(model, 256, approximate=False)
    for seed in (1, 2):
        rows = _rows(model, counts, seed)
        made = _batch(model, rows, seed)
        batch, x = made.batch, torch.full((len(made.batch.row), D), NAN, device=DEVICE)
        raw = batch.raw[: len(batch.raw) // 4 * 4].view(torch.int32)  # words of any type
        tokens.run(batch.tiles, batch.row, batch.source, batch.position, batch.bucket, raw, x)
        expected = _expected(model, rows, made)
        assert int(expected.isfinite().all(1).sum()) == made.tokens
        torch.testing.assert_close(x, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
        counts = [count // 2 for count in counts]


@torch.inference_mode()
def test_a_table_trained_in_place_is_seen() -> None:
    model = _model(BARE_SCHEMA)
    tokens, rows = TokenEmbedding(model, 64, approximate=False), _rows(model, [4, 4], 1)
    for table in (model.tables.tables["item"], model.position, model.recency, model.hour):
        table.mul_(-2)
    made = _batch(model, rows, 1)
    batch, x = made.batch, torch.full((len(made.batch.row), D), NAN, device=DEVICE)
    tokens.run(batch.tiles, batch.row, batch.source, batch.position, batch.bucket, batch.raw, x)
    torch.testing.assert_close(x, _expected(model, rows, made), rtol=2e-5, atol=2e-5, equal_nan=True)


def test_a_capacity_of_nothing_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="capacity_tokens"):
        TokenEmbedding(_model(BARE_SCHEMA), 0)


@pytest.mark.parametrize("tasks", [("ctr",), ("ctr", "ctcvr", "stay")])
@torch.inference_mode()
def test_logits_equal_the_models(tasks: tuple[str, ...]) -> None:
    model = _model(BARE_SCHEMA, tasks=tasks)
    x, offset = torch.randn(90, D, device=DEVICE), torch.randn(D, device=DEVICE)
    row = torch.randperm(90).to(torch.int32).to(DEVICE)
    counts = torch.tensor([0, 0, 11, 70], dtype=torch.int32, device=DEVICE)[2:]
    logits = torch.full((90, len(tasks)), NAN, device=DEVICE)
    TaskHeads(model, approximate=False).run(x, offset, row, counts, logits)
    expected = model.logits(x[row[11:81].long()] + offset)
    torch.testing.assert_close(logits[:70], expected, rtol=2e-5, atol=2e-5)
    assert logits[70:].isnan().all()
