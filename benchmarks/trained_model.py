"""A small ranking model trained on a generated, labelled trace: weights whose accuracy means something.

    python benchmarks/trained_model.py

How the weights are made: the generator draws users who have favourite categories, whose candidates
come from these half of the time and are then clicked nineteen times as often. Categories are not among
the features, so the model must tell from the items of a history which candidates go with it. Item
embeddings start from a truncated SVD of who has which item in the histories, all else from seeded
noise; then the project's own model (MTGR's groups and mask) trains in its own forward pass under
autograd: AdamW, binary cross-entropy of the clicks on the ctr task, one pass over the training users,
float32 on one CPU core. A user's sequence holds the history and the candidates of every request
since S was frozen, each of which sees what had happened before it. Users held out are in neither.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ranking_metrics import auc  # noqa: E402

from mtserve.config import ModelConfig  # noqa: E402
from mtserve.kernels.backend import Kernels, load_kernels  # noqa: E402
from mtserve.kernels.plan import HostPlan, KernelPlan  # noqa: E402
from mtserve.model.cut import cut_history  # noqa: E402
from mtserve.model.mask import Groups, candidate_limits, visible_limits  # noqa: E402
from mtserve.model.ranking import GROUP_C, GROUP_R, GROUP_S, GROUP_U, RankingModel  # noqa: E402
from mtserve.model.schema import Feature, FeatureSchema  # noqa: E402
from mtserve.model.tokeniser import KindTokens, TokenInputs, gap_buckets  # noqa: E402
from mtserve.model.weights import initialise, load, save  # noqa: E402
from mtserve.trace.generator.config import GeneratorConfig  # noqa: E402
from mtserve.trace.generator.synthesis import generate  # noqa: E402
from mtserve.trace.replay.features import TraceRows  # noqa: E402
from mtserve.types import History, Rows  # noqa: E402

SEED = 20
CONFIG = ModelConfig(
    name="trained", layers=6, d=128, heads=4, head_dim=32,
    max_history=2048, max_realtime=256, attention_length=1024, tasks=("ctr",),
)  # fmt: skip
TRACE = GeneratorConfig(
    name="labelled", seed=SEED, users=700, requests=4200, days=2, activity_sigma=0.0,
    history_median=700, history_sigma=0.4, history_max=1800, candidates_mean=64, candidates_spread="fixed",
    clicks_mean=16, items=1000, categories=40, taste=0.5, taste_lift=1.9,
)  # fmt: skip
ITEM = Feature("item", buckets=1 << 16, dim=32)
SCHEMA = FeatureSchema(
    user=(Feature("segment", buckets=64, dim=8), Feature("activity", kind="dense", width=2)),
    behaviour=(ITEM, Feature("action", buckets=16, dim=8)),
    candidate=(ITEM, Feature("surface", buckets=16, dim=8, role="context")),
)
HELD_OUT = 100
CURVE_USERS = 16  # held-out users that a point of the curve is measured on
ACCUMULATED = 4  # users of one step
LEARNING_RATE, WARM_UP_STEPS = 2e-3, 10
CACHE = ROOT / ".data"


@dataclass(frozen=True, eq=False)
class Sample:
    """One user as of the last request, and the candidates of every request since S was frozen.

    `candidates` [c], `clicked` bool [c]; those of request i are rows offsets[i]:offsets[i + 1].
    """

    history: History
    candidates: Rows
    clicked: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tokens:
    """One sample's sequence: U, S, R and candidates, with what each row sees."""

    groups: Groups
    inputs: TokenInputs
    limit: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]

    def plan(self, cached: int = 0, candidates: bool = True) -> HostPlan:
        """The plan that encodes prefix tokens [cached, prefix) and the candidates over one page of all tokens."""
        rows = np.arange(cached, self.inputs.rows if candidates else self.groups.prefix)
        prefix = self.groups.prefix
        return HostPlan(
            page_tokens=prefix,
            slots=np.array([[cached, prefix - cached, 0, len(rows)]], np.int32),
            page_table=np.zeros((1, 1), np.int32),
            limit=self.limit[rows],
            group=self.group[rows],
            target=np.where(rows < prefix, rows, -1).astype(np.int32),
            candidate_rows=np.flatnonzero(rows >= prefix),
        )


def samples(rows: TraceRows, users: range, config: ModelConfig) -> Iterator[Sample]:
    """Samples of those of `users` that have a request."""
    positions = rows.trace.prefix_lengths()
    for user in users:
        own = np.flatnonzero(rows.trace.user == user)
        if not len(own):
            continue
        history = rows.history_at(int(own[-1]))
        frozen = cut_history(history.position, config).static_end
        requests = [rows.trace.request(int(i)) for i in own if positions[i] >= frozen]
        yield Sample(
            history,
            np.concatenate([rows.candidates(request) for request in requests]),
            np.concatenate([np.isin(request.cand, request.clicked) for request in requests]),
            np.cumsum([0, *(len(request.cand) for request in requests)]),
        )


def tokens_of(model: RankingModel, history: History, candidates: Rows) -> Tokens:
    """The sequence of `history` and `candidates`, whose exposure times are resolved."""
    cut = cut_history(history.position, model.config, history.first)
    kept = history.behaviours[cut.start - history.first :]
    groups = Groups(len(model.schema.user), cut.static_end - cut.start, cut.end - cut.static_end)
    times, exposure = kept["time_ms"], candidates["time_ms"]
    limits = candidate_limits(groups, times[groups.static :], exposure)
    assert (limits > groups.user).all(), "a candidate that no behaviour precedes has no recency"
    recency = exposure - times[limits - groups.user - 1]
    features = np.zeros(1, model.schema.user_dtype) if history.features is None else history.features
    kinds = [_kind(features, token, np.zeros(1, np.int64)) for token in range(groups.user)]
    kinds.append(_kind(kept, groups.user, np.diff(times, prepend=times[:1])))
    kinds.append(_kind(candidates, groups.prefix, recency))
    lengths = {GROUP_U: groups.user, GROUP_S: groups.static, GROUP_R: groups.realtime, GROUP_C: len(candidates)}
    return Tokens(
        groups,
        TokenInputs(groups.prefix + len(candidates), tuple(kinds)),
        np.concatenate([visible_limits(groups, model.config.static_attention, 0, groups.prefix), limits]),
        np.repeat(np.array(list(lengths), np.int32), list(lengths.values())),
    )


def _kind(rows: Rows, first: int, gap_ms: npt.NDArray[np.int64]) -> KindTokens:
    index = np.arange(len(rows))
    return KindTokens(features=rows, destinations=first + index, position=index, bucket=gap_buckets(gap_ms))


def logits_of(model: RankingModel, sample: Sample, kernels: Kernels) -> torch.Tensor:
    """float32 [c] logits of a sample's candidates, nothing cached."""
    tokens = tokens_of(model, sample.history, sample.candidates)
    plan = KernelPlan.of(tokens.plan(), model.device)
    x = model.encode(model.embed(tokens.inputs), None, plan, kernels)
    return model.logits(x[plan.candidate_rows])[:, 0]


@torch.no_grad()
def held_out_auc(model: RankingModel, held_out: list[Sample], kernels: Kernels) -> float:
    scores = [logits_of(model, sample, kernels).numpy() for sample in held_out]
    return auc(np.concatenate(scores), np.concatenate([sample.clicked for sample in held_out]))


def train(rows: TraceRows, model: RankingModel, points: int = 10) -> None:
    """One pass over the users that are not held out, `model` in place; prints `points` of the curve."""
    kernels = load_kernels("eager")
    users = list(samples(rows, range(rows.trace.users - HELD_OUT), model.config))
    held_out = list(samples(rows, held_out_users(rows), model.config))[:CURVE_USERS]
    steps = len(users) // ACCUMULATED
    optimiser = torch.optim.AdamW(model.requires_grad_(True).parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    order = np.random.default_rng(SEED).permutation(len(users))
    print(f"{'users':>6} {'seconds':>8} {'loss':>7} {'held-out AUC':>13}")
    print(f"{0:6d} {0:8.0f} {'':>7} {held_out_auc(model, held_out, kernels):13.4f}", flush=True)
    started, losses = time.perf_counter(), []
    for step in range(steps):
        for user in order[step * ACCUMULATED : (step + 1) * ACCUMULATED]:
            losses.append(_accumulate(model, users[user], kernels))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if (step + 1) * points // steps > step * points // steps:
            seconds, reached = time.perf_counter() - started, held_out_auc(model, held_out, kernels)
            print(f"{len(losses):6d} {seconds:8.0f} {np.mean(losses[-100:]):7.4f} {reached:13.4f}", flush=True)
    model.requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    """Share of LEARNING_RATE: a linear rise, then a cosine to 0."""
    return min((step + 1) / WARM_UP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _accumulate(model: RankingModel, sample: Sample, kernels: Kernels) -> float:
    """Adds one user's gradients; returns the loss."""
    target = torch.from_numpy(sample.clicked.astype(np.float32))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits_of(model, sample, kernels), target)
    (loss / ACCUMULATED).backward()
    return loss.item()


def held_out_users(rows: TraceRows) -> range:
    """The users of the trace that never train."""
    return range(rows.trace.users - HELD_OUT, rows.trace.users)


def untrained_model(rows: TraceRows) -> RankingModel:
    """Seeded noise but for the items' embeddings, which are alike for items of the same training users."""
    model = initialise(RankingModel(CONFIG, rows.schema), SEED)
    trace, users = rows.trace, rows.trace.users - HELD_OUT
    ids, item = np.unique(trace.history_items[: trace.history_offsets[users]], return_inverse=True)
    seen = np.zeros((users, len(ids)), np.float32)
    np.add.at(seen, (np.repeat(np.arange(users), trace.history_lengths[:users]), item), 1)
    seen = np.log1p(seen)
    seen -= seen.mean(0)
    seen /= np.maximum(np.linalg.norm(seen, axis=0), 1e-6)
    _, scales, directions = np.linalg.svd(seen, full_matrices=False)
    vectors = (scales[: ITEM.dim, None] * directions[: ITEM.dim]).T
    vectors *= ITEM.dim**0.5 / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    table = model.tables.tables["item"]
    table[torch.from_numpy(model.tables.indices("item", ids))] = torch.from_numpy(vectors)
    return model


def trained_model(path: Path | None = None) -> tuple[RankingModel, TraceRows]:
    """The trained model, from `path` if it was kept there, and the rows of its trace.

    The path that is used without one names what the weights depend on.
    """
    recipe = repr((CONFIG, TRACE, SCHEMA, SEED, HELD_OUT, ACCUMULATED, LEARNING_RATE, WARM_UP_STEPS))
    path = path or CACHE / f"trained_model_{zlib.crc32(recipe.encode()):08x}.safetensors"
    rows = TraceRows(generate(TRACE), SCHEMA)
    if path.is_file():
        return load(path), rows
    model = untrained_model(rows)
    train(rows, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    return model, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="weights kept there are used again (default: below .data)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = trained_model(options.out)
    held_out = list(samples(rows, held_out_users(rows), model.config))
    print(f"AUC over {HELD_OUT} held-out users: {held_out_auc(model, held_out, load_kernels('eager')):.4f}")


if __name__ == "__main__":
    main()
