"""Full recompute of one request in plain fp32 torch: the truth that every cached score is held against.

Written from the definition alone: dense masks from `mask.visibility`, no pages, no limits, no
batching, none of the planner's arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch

from mtserve.kernels.group_layer_norm.reference import group_layer_norm
from mtserve.kernels.norm_gate.reference import norm_gate
from mtserve.kernels.page_write.rounding import rounded
from mtserve.kernels.projection_silu.reference import projection_silu
from mtserve.model.cut import cut_history
from mtserve.model.hstu import HSTULayer
from mtserve.model.mask import Groups, visibility
from mtserve.model.ranking import RankingModel
from mtserve.model.tokeniser import KindTokens, TokenInputs, gap_buckets
from mtserve.types import History, Rows


def recompute(
    model: RankingModel, history: History, candidates: Rows, pages: torch.dtype = torch.float32
) -> torch.Tensor:
    """float32 [candidates, tasks] logits; `candidates` with exposure times resolved (none is -1).

    `pages`: the type of the pages that K and V are `rounded` for.
    """
    assert (candidates["time_ms"] >= 0).all()
    config = model.config
    cut = cut_history(history.position, config, history.first)
    kept = history.behaviours[cut.start - history.first :]
    groups = Groups(len(model.schema.user), cut.static_end - cut.start, cut.end - cut.static_end)
    seen = [int((kept["time_ms"][groups.static :] < exposure).sum()) for exposure in candidates["time_ms"]]
    x = model.embed(_inputs(model, history, kept, groups, candidates, seen)).float().cpu()
    mask = torch.from_numpy(visibility(groups, config.static_attention, np.array(seen, dtype=np.int64)))
    labels = [0] * groups.user + [1] * groups.static + [2] * groups.realtime + [3] * len(candidates)
    group = torch.tensor(labels) if config.norm == "group" else torch.zeros(len(x), dtype=torch.int64)
    for layer in model.layers:
        assert isinstance(layer, HSTULayer)
        x = _layer(layer, x, mask, group, pages)
    rows = x[groups.prefix :].to(model.device, model.dtype)
    return model.logits(rows).cpu()


def _layer(
    layer: HSTULayer, x: torch.Tensor, mask: torch.Tensor, group: torch.Tensor, pages: torch.dtype
) -> torch.Tensor:
    normalised = group_layer_norm(x, layer.norm_weight, layer.norm_bias, group)
    mixed = projection_silu(normalised, layer.uvqk_weight, layer.uvqk_bias)
    u, v, q, k = mixed.view(len(x), 4, layer.heads, layer.head_dim).unbind(1)
    k, v = rounded(k, pages), rounded(v, pages)
    logits = torch.einsum("ihd,jhd->hij", q, k) / layer.head_dim**0.5
    weights = logits * torch.sigmoid(logits) / layer.attention_length * mask
    y = torch.einsum("hij,jhd->ihd", weights, v)
    gated = norm_gate(y.flatten(1), u.flatten(1), layer.gate_weight, layer.gate_bias, group, layer.gate_first)
    return x + gated @ layer.output_weight.float().cpu() + layer.output_bias.float().cpu()


def _inputs(
    model: RankingModel, history: History, kept: Rows, groups: Groups, candidates: Rows, seen: list[int]
) -> TokenInputs:
    features = np.zeros(1, model.schema.user_dtype) if history.features is None else history.features.copy()
    times = [int(time) for time in kept["time_ms"]]
    gaps = [0 if i == 0 else times[i] - times[i - 1] for i in range(len(times))]
    recency = [
        int(exposure) - times[groups.static + count - 1] if groups.static + count else 0
        for exposure, count in zip(candidates["time_ms"], seen, strict=True)
    ]
    kinds = [_kind(features, token, [0], [0]) for token in range(groups.user)]
    kinds.append(_kind(kept, groups.user, list(range(len(kept))), gaps))
    kinds.append(_kind(candidates, groups.prefix, [0] * len(candidates), recency))
    return TokenInputs(groups.prefix + len(candidates), tuple(kinds))


def _kind(rows: Rows, first: int, position: list[int], gaps_ms: list[int]) -> KindTokens:
    """Tokens of neighbouring rows of the sequence, from `first` on."""
    return KindTokens(
        features=rows,
        destinations=np.arange(first, first + len(rows)),
        position=np.array(position, dtype=np.int64),
        bucket=gap_buckets(np.array(gaps_ms, dtype=np.int64)),
    )
