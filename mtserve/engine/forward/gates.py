"""How the layers of a captured forward wait for pages that are still on their way from the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtserve.kernels.cuda.driver import Event, OwnStream
from mtserve.transfer.cuda_mover import LayerArrivals
from mtserve.transfer.mover import Arrivals


class LayerWaits:
    """One event a group of layers, which captured graphs wait for before the group's first layer.

    A graph's wait is for what its event marks at the launch, not at the capture and not later: each launch first makes
    them mark the arrivals of its own batch, and a batch launched after it makes them mark others.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        """`groups`: the first layer of each."""
        self.events = {first: Event() for first in groups}

    def before(self, layer: int, *, first: bool = False) -> None:
        """Queue, or capture, the wait of layer `layer` on the current stream, if it is the first of its group.

        `first`: no layer of the group comes before it, as in a batch whose earlier layers wait for nothing.
        """
        group = max(each for each in self.events if each <= layer)
        if first or layer == group:
            capturing = torch.cuda.is_current_stream_capturing()
            self.events[group].hold_back(torch.cuda.current_stream().cuda_stream, external=capturing)


class Gates:
    """Ties the waits to the loads of one batch and notes when each was over. Used again once its batch has landed."""

    def __init__(self, waits: LayerWaits, groups: Sequence[int]) -> None:
        """`groups`: as those of `waits`. On the current device."""
        self._waits = waits
        self._stream = OwnStream()  # what waits here holds nobody else's work back
        self._began = Event(timed=True)
        self._came = {first: Event(timed=True) for first in groups}

    def open_at(self, arrivals: Arrivals, stream: int) -> None:
        """Have the graph launched next on `stream` wait for `arrivals`, group by group."""
        assert isinstance(arrivals, LayerArrivals)
        arrivals.queued()
        self._began.record(stream)
        own = self._stream.handle
        for arrived, (first, came) in zip(arrivals.events, self._came.items(), strict=True):
            arrived.hold_back(own)
            came.record(own)
            self._waits.events[first].record(own)

    def waited(self) -> dict[int, float]:
        """First layer -> seconds from the batch's start until the group's pages had come, 0 where they were there."""
        return {first: max(0.0, came.seconds_since(self._began)) for first, came in self._came.items()}
