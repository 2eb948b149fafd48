"""Hashed embedding tables: any int64 id finds a row, without a vocabulary."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mtserve.model.schema import FeatureSchema


class HashedTables(nn.Module):
    """One table [buckets, dim] for each table name of the schema."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        self.tables = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(shape)) for name, shape in schema.tables.items()}
        )

    def indices(self, table: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 [n] rows of `table` for int64 ids [n]."""
        return hash_ids(ids, table_salt(table), self.tables[table].shape[0])

    def forward(self, table: str, rows: torch.Tensor) -> torch.Tensor:
        """[n, dim] values of int64 rows [n]."""
        return self.tables[table].index_select(0, rows)


@lru_cache(4096)
def table_salt(table: str) -> int:
    """A constant of the table's name, so that equal ids of two tables collide with different others."""
    return int.from_bytes(hashlib.blake2b(table.encode(), digest_size=8).digest(), "little")


def hash_ids(ids: npt.NDArray[np.int64], salt: int, buckets: int) -> npt.NDArray[np.int64]:
    """int64 [n] in [0, buckets): splitmix64 (Steele, Lea, Flood, 2014) of id xor salt, modulo buckets."""
    z = ids.astype(np.int64).view(np.uint64) ^ np.uint64(salt)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(buckets)).astype(np.int64)
