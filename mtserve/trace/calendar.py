"""Hours, days and weekends of a trace's clock, which is UTC."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtserve.trace.schema import Ints

HOUR_S = 3600.0
HOUR_MS = 3_600_000
DAY_S = 86_400.0
DAY_MS = 86_400_000
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0
SATURDAY = 5


def is_weekend(day: Ints) -> npt.NDArray[np.bool_]:
    """Whether days, counted from the epoch, are Saturdays or Sundays (UTC)."""
    return (day + EPOCH_WEEKDAY) % 7 >= SATURDAY
