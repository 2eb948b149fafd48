"""Small traces, and where the shared data folder is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mtserve.trace.schema import Trace, TraceMeta


def wide(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def small(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def sample_trace(**changes: object) -> Trace:
    """Three users (one without history, one without requests), three requests; `changes` replaces columns."""
    columns: dict[str, object] = {
        "user_ids": ("ann", "7", "ünï"),
        "history_offsets": wide(0, 3, 3, 5),
        "history_items": wide(5, -4, 2**62, 8, 8),
        "history_t_ms": wide(10, 20, 20, 0, 99),
        "history_actions": small(1, 1, 3, 1, 1),
        "user": small(1, 0, 1),
        "t_ms": wide(15, 20, 20),
        "session": wide(4, 0, -1),
        "cand_offsets": wide(0, 2, 3, 7),
        "cand_items": wide(1, 2, 3, 4, 4, 5, 6),
        "clicked_offsets": wide(0, 2, 2, 3),
        "clicked_items": wide(2, 9, 6),
        "clicked_actions": small(1, 1, 70),
        "meta": TraceMeta("sample", "by hand", 3, True, {"moved": 2}, {"share": 0.5, "kind": "x", "n": 1}),
    }
    return Trace(**{**columns, **changes})  # type: ignore[arg-type]


def shared_data(*parts: str) -> Path:
    """A file of the shared data folder; skips the test where there is none."""
    root = os.environ.get("MTSERVE_SHARED_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data"
    path = Path(root, *parts)
    if not path.is_file():
        pytest.skip(f"{'/'.join(parts)} is not in the shared data folder; point MTSERVE_SHARED_DATA at it")
    return path
