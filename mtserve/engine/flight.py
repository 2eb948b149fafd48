"""A batch between its launch and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtserve.engine.forward.batch import BatchPlan
from mtserve.engine.forward.runner import Pending
from mtserve.engine.queue.filling import Slot
from mtserve.engine.tiers.tiers import Reservation


@dataclass(frozen=True)
class Flight:
    """What was launched, with what it holds; `reservation` is None where no states are kept."""

    slots: Sequence[Slot]
    reservation: Reservation | None
    plan: BatchPlan
    pending: Pending
    began: float  # on the engine's clock
    launched: float  # on the stopwatch's
