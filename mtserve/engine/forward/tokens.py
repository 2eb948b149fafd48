"""A model's tokens by the GPU's kernels: from a batch's arrays on the device to the rows of x."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mtserve.errors import InvalidArgument
from mtserve.kernels.token_embedding.batch import TokenBatch
from mtserve.kernels.token_embedding.packed import pack_tokens
from mtserve.kernels.token_embedding.triton import token_embedding
from mtserve.kernels.token_embedding.weights import Column, KindWeights, TokenWeights
from mtserve.model.embedding import table_salt
from mtserve.model.ranking import RankingModel
from mtserve.model.tokeniser import Tokeniser


class TokenEmbedding:
    """Three launches on the current stream, capturable: no allocation, nothing read back, grids of fixed size.

    Memory, in values of the model's type: copies of the tokenisers' weights, for each kind d (w + d), w being its
    input's width rounded up to a multiple of 64; and scratch, `capacity_tokens` (w of the widest kind + d). The
    embedding tables, position, gap, recency and hour are read in place: they must stay where they are.
    """

    def __init__(self, model: RankingModel, capacity_tokens: int, *, approximate: bool = True) -> None:
        """`approximate`: the hardware's tanh in SiLU; False for checks in fp32, and under Triton's interpreter."""
        if capacity_tokens < 1:
            raise InvalidArgument(f"{capacity_tokens} is below 1", field="capacity_tokens")
        self._approximate = approximate
        self._packed = pack_tokens(_weights(model))
        depth, d = self._packed.depth, model.config.d
        self._features = torch.empty(capacity_tokens, depth, dtype=model.dtype, device=model.device)
        self._hidden = torch.empty(capacity_tokens, d, dtype=model.dtype, device=model.device)

    def run(
        self,
        tiles: torch.Tensor,
        row: torch.Tensor,
        source: torch.Tensor,
        position: torch.Tensor,
        bucket: torch.Tensor,
        raw: torch.Tensor,
        x: torch.Tensor,
    ) -> None:
        """Write the tokens of a batch (as in `TokenBatch`, at most `capacity_tokens`) to their rows of x [rows, d]."""
        batch = TokenBatch(tiles, row, source, position, bucket, raw)
        token_embedding(self._packed, batch, self._features, self._hidden, x, approximate=self._approximate)


def _weights(model: RankingModel) -> TokenWeights:
    schema = model.schema
    tokenisers = [*model.user_tokens, model.behaviour_token, model.candidate_token]
    rows = [*(schema.user_dtype for _ in schema.user), schema.behaviour_dtype, schema.candidate_dtype]
    kinds = [_kind(model, tokeniser, dtype) for tokeniser, dtype in zip(tokenisers, rows, strict=True)]
    added = (model.position, model.gap, model.recency, model.hour)
    return TokenWeights(tuple(kinds), *(table.detach() for table in added))


def _kind(model: RankingModel, tokeniser: torch.nn.Module, row: np.dtype[np.void]) -> KindWeights:
    """`row` may hold more features than the tokeniser takes."""
    assert isinstance(tokeniser, Tokeniser) and row.fields is not None
    columns = []
    for feature in tokeniser.features:
        column = Column(row.fields[feature.name][1], feature.encoded_width)
        if feature.kind == "categorical":
            table = model.tables.tables[feature.table].detach()
            column = replace(column, table=table, salt=table_salt(feature.table))
        columns.append(column)
    linear, output = tokeniser.input, tokeniser.output
    return KindWeights(
        tuple(columns), linear.weight.detach(), linear.bias.detach(), output.weight.detach(), output.bias.detach()
    )
