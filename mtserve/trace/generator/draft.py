"""Requests while they are being drawn: what was clicked is still a mark on each candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.trace.csr import gather, offsets_of
from mtserve.trace.schema import CLICK, Ints, SmallInts


@dataclass(frozen=True)
class Draft:
    """N requests of C candidates in all, in the order of their times."""

    user: SmallInts  # [N]
    t_ms: Ints  # [N] ms from the trace's start
    offsets: Ints  # [N + 1]
    cand: Ints  # [C]
    clicked: npt.NDArray[np.bool_]  # [C]

    def merged(self, other: Draft) -> Draft:
        """Both together, in the order of time; of equal times, the own ones first."""
        t_ms = np.concatenate([self.t_ms, other.t_ms])
        order = np.argsort(t_ms, kind="stable")
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        places = gather(offsets, order)
        return Draft(
            np.concatenate([self.user, other.user])[order],
            t_ms[order],
            offsets_of(np.diff(offsets)[order]),
            np.concatenate([self.cand, other.cand])[places],
            np.concatenate([self.clicked, other.clicked])[places],
        )

    def columns(self, start_ms: int) -> dict[str, Any]:
        """The columns of a trace that starts at `start_ms`, all but the sessions."""
        sums = offsets_of(self.clicked)
        return {
            "user": self.user,
            "t_ms": self.t_ms + start_ms,
            "cand_offsets": self.offsets,
            "cand_items": self.cand,
            "clicked_offsets": sums[self.offsets],
            "clicked_items": self.cand[self.clicked],
            "clicked_actions": np.full(int(sums[-1]), CLICK, dtype=np.int32),
        }
