"""The token sequence of one user at one moment, and the chain that verifies its states."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from mtserve.cache.keys import digest, extend_chain
from mtserve.config import ModelConfig
from mtserve.model.cut import Cut, cut_history
from mtserve.model.mask import Groups
from mtserve.model.schema import FeatureSchema
from mtserve.types import Chain, History, Rows


@dataclass(frozen=True)
class UserSequence:
    """U, S and R of one user as they stood when a request came; frozen, whatever happens upstream later.

    `kept` are the behaviours [cut.start, cut.end); `chain` [prefix tokens] starts from `root`, which
    stands for the model, the cut and (with full static attention) all of U and S: the generation.
    """

    user_id: str
    features: Rows  # [1]
    cut: Cut
    groups: Groups
    kept: Rows
    root: int
    chain: Chain
    seed: int  # of the builder: which model `root` stands for

    @property
    def position(self) -> int:
        return self.cut.end

    def extends(self, other: UserSequence) -> bool:
        """Whether `other` is this sequence at an earlier moment of the same generation."""
        shorter = len(other.chain)
        if self.root != other.root or shorter > len(self.chain):
            return False
        return shorter == 0 or bool(self.chain[shorter - 1] == other.chain[shorter - 1])


class SequenceBuilder:
    """Builds sequences for one model; `fingerprint` covers weights, dtype and page geometry."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema, fingerprint: str) -> None:
        self.config, self.schema = config, schema
        self.seed = digest(fingerprint.encode())
        self._no_features = np.zeros(1, schema.user_dtype)

    def build(self, user_id: str, history: History) -> UserSequence:
        """The sequence of `history`, its chain computed from the start."""
        cut = cut_history(history.position, self.config, history.first)
        return self._assemble(user_id, history, cut, None, None)

    def grow(self, old: UserSequence, history: History, chain: Chain) -> UserSequence | None:
        """The sequence of `history`, which adds rows at the end of `old`'s; None when that is a new generation.

        `chain` [at least the new prefix] already holds `old.chain` and receives the rest in place.
        """
        cut = cut_history(history.position, self.config, history.first)
        if (cut.start, cut.static_end) != (old.cut.start, old.cut.static_end):
            return None
        return self._assemble(old.user_id, history, cut, old, chain)

    def _assemble(
        self, user_id: str, history: History, cut: Cut, old: UserSequence | None, chain: Chain | None
    ) -> UserSequence:
        features = self._no_features if history.features is None else history.features
        kept = history.behaviours[cut.start - history.first :]
        groups = Groups(len(self.schema.user), cut.static_end - cut.start, cut.end - cut.static_end)
        assert groups.user + len(kept) == groups.prefix
        if old is not None and chain is not None:
            known = len(old.chain)
            seed = int(old.chain[-1]) if known else old.root
            extend_chain(chain[known : groups.prefix], kept[known - groups.user :], seed)
            return UserSequence(user_id, features, cut, groups, kept, old.root, chain[: groups.prefix], self.seed)
        root = self._root(cut, features, kept[: groups.static])
        chain = np.empty(groups.prefix, dtype=np.uint64)
        extend_chain(chain[: groups.user], np.repeat(features, groups.user), root)
        seed = int(chain[groups.user - 1]) if groups.user else root
        extend_chain(chain[groups.user :], kept, seed)
        return UserSequence(user_id, features, cut, groups, kept, root, chain, self.seed)

    def _root(self, cut: Cut, features: Rows, static: Rows) -> int:
        root = digest(struct.pack("<qq", cut.start, cut.static_end), self.seed)
        if self.config.static_attention == "full":
            # Every U and S state has seen all of U and S, so a change of any ends the generation.
            root = digest(features.tobytes(), root)
            root = digest(static.tobytes(), root)
        return root
