"""The packed twins of the device's pages, and the rows of one layer on their way into them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mtserve.kernels.host_format.shape import FormatShape


class PackedPages(NamedTuple):
    """Of each page id of the device a packed page: `pages` uint8 [pages, shape.bytes]."""

    shape: FormatShape
    pages: torch.Tensor

    def rows(self, target: torch.Tensor, layer: int) -> PackedRows:
        """Where rows of `layer` go; `target` int32 [at least T]: page * page_tokens + offset, -1: nowhere."""
        return PackedRows(self.shape, self.pages, target, layer)


class PackedRows(NamedTuple):
    """Where a batch's rows of one layer go in packed `pages`: the arguments of encode_rows but the rows themselves.

    `pages` uint8 [pages, shape.bytes]; `target` int32 [at least T]: page * page_tokens + offset, -1 for a row that is
    not kept, no two alike but -1.
    """

    shape: FormatShape
    pages: torch.Tensor
    target: torch.Tensor
    layer: int
