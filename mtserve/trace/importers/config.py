"""What an import can be told, whichever the log."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtserve.config import Config, option

MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class ImportConfig(Config):
    """Options of `import_trace`; what a log has no use for is ignored by its importer, as documented there."""

    name: str = option("", "name shown in reports; empty: the kind of log")
    seed: int = option(0, "seed of sampled users and candidates", low=0, high=2**63 - 1)
    user_share: float = option(1.0, "share of users to import, picked by a hash of the id", low=0.0, high=1.0)
    history_share: float = option(0.0, "share of each user's first requests turned into history", low=0.0, high=1.0)
    session_gap_s: int = option(1800, "pause that starts a session", low=1, high=10_000_000, unit="s")
    request_gap_ms: int = option(
        1000, "kuairand: exposures of one user less far apart are one request", low=1, high=86_400_000, unit="ms"
    )
    negatives: int = option(19, "movielens: candidates sampled beside the rated item", low=0, high=10_000)
    history_spacing_s: int = option(
        3600, "mind: made-up time between history items, which have none", low=0, high=86_400, unit="s"
    )


def keeps(ids: npt.NDArray[np.integer], config: ImportConfig) -> npt.NDArray[np.bool_]:
    """Whether each user belongs to the sample: the same users for the same seed, in any file (splitmix64)."""
    if config.user_share >= 1:
        return np.ones(len(ids), dtype=np.bool_)
    mixed = ids.astype(np.uint64) + np.uint64((config.seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(MIX[0])
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(MIX[1])
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < config.user_share
