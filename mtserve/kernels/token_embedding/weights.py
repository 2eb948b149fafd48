"""What each kind of token is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Column:
    """One feature of a kind: `width` values of its token's input, read from byte `offset` of its row.

    `table` [buckets, width]: the input is its row splitmix64(id xor salt) mod buckets for the int64 id found there.
    None: the values themselves are there, float32 [width].
    """

    offset: int
    width: int
    table: torch.Tensor | None = None
    salt: int = 0


@dataclass(frozen=True)
class KindWeights:
    """One kind's columns, in the order of its input, and its MLP: input [d, sum of widths], output [d, d], biases [d]."""

    columns: tuple[Column, ...]
    input_weight: torch.Tensor
    input_bias: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor

    def __post_init__(self) -> None:
        d, width = self.input_weight.shape
        assert width == sum(column.width for column in self.columns)
        assert self.output_weight.shape == (d, d) and self.input_bias.shape == self.output_bias.shape == (d,)


@dataclass(frozen=True)
class TokenWeights:
    """All kinds: one for each user feature, then behaviours, then candidates; and the tables added to their tokens.

    Behaviours add position [positions, d], gap [buckets, d] and hour [168, d]; candidates recency [buckets, d]
    and hour. Rows of these two kinds begin with int64 time_ms, at least 0.
    """

    kinds: tuple[KindWeights, ...]
    position: torch.Tensor
    gap: torch.Tensor
    recency: torch.Tensor
    hour: torch.Tensor

    @property
    def d(self) -> int:
        return self.hour.shape[1]

    @property
    def behaviours(self) -> int:
        """The behaviours' kind; the candidates' is the next and last."""
        return len(self.kinds) - 2
