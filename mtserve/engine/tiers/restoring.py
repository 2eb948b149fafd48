"""Batches of users whose states only the host has: what of them is loaded, and what is encoded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mtserve.cache.index import Load, TieredIndex
from mtserve.config import EngineConfig
from mtserve.engine.queue.filling import Slot
from mtserve.engine.tiers.transfers import Transfers
from mtserve.metrics import Metrics
from mtserve.restore.choice import NOTHING, Choice, Layout, Need, Work, choose, user_work
from mtserve.restore.costs import Costs
from mtserve.restore.watch import PredictionWatch
from mtserve.transfer.mover import LOAD, Arrivals, Finished, Mover, Pieces


class Restored(NamedTuple):
    """How a batch begins: layers from `choice.first_layer` on of `loads` come over the link, the others are encoded.

    `cached`: of each user of `loads`, tokens whose states the device had; `arrivals`: what the later layers wait for.
    """

    choice: Choice
    loads: tuple[Load, ...]
    cached: dict[str, int]
    arrivals: Arrivals | None

    def early(self, users: Sequence[str], cached: Sequence[int]) -> list[int]:
        """Tokens of each user from which the layers before the loaded ones encode; `cached`: from which the others do."""
        return [self.cached.get(user, tokens) for user, tokens in zip(users, cached, strict=True)]


class Restoring:
    """Decides for each such batch, begins its loads, and ends them with it.

    What a load brings of some layers only is worth nothing without what the batch makes of the others. So such a load
    succeeds for the index only once both have.
    """

    def __init__(
        self,
        index: TieredIndex,
        mover: Mover,
        transfers: Transfers,
        config: EngineConfig,
        metrics: Metrics,
        costs: Costs,
        *,
        frozen_sees_all: bool,
    ) -> None:
        """`frozen_sees_all`: whether U and S rows see one another.

        `way`, as in `choose`, and `last`, what was decided last, are for benchmarks, which force and compare ways.
        """
        self._index, self._mover, self._transfers, self._metrics = index, mover, transfers, metrics
        self._costs, self.way, self._frozen_sees_all = costs, config.restore, frozen_sees_all
        layers, layer_bytes = mover.pool.shape[1], mover.pool[:1, :1].nbytes
        self._layers, self._layer_bytes, self._page_tokens = layers, layer_bytes, config.page_tokens
        self._open: dict[int, bool | None] = {}  # loads of some layers: whether the copy succeeded, once it is over
        self._doomed: set[int] = set()  # of these, those whose batch has failed
        self.watch = PredictionWatch()
        self.last: Choice | None = None

    def begin(self, slots: Sequence[Slot], before_copies: Callable[[], None]) -> Restored | None:
        """Decide, and start what is to be loaded, just before the batch of `slots` begins; None where nothing is restored.

        `before_copies()` is called when pages have been found and nothing touches them yet.
        """
        restored = [slot for slot in slots if slot.restored]
        if not restored:
            return None
        sequences = [slot.sequence for slot in restored]
        begun = self._index.begin_loads([each.user_id for each in sequences], [each.chain for each in sequences])
        # The device may have no room for another.
        brought = [(slot, load) for slot, load in zip(restored, begun, strict=True) if load is not None]
        loads = [load for _, load in brought]
        try:
            pieces = self._mover.split_pieces(loads) if loads else None
            choice = self._decide(slots, brought, pieces)
        except Exception:
            self._end_all(loads)
            raise
        self._metrics.count("restored_batches_total", 1, choice.way)
        self.last = choice
        if choice.first_layer == self._layers:
            self._end_all(loads)
            return Restored(choice, (), {}, None)
        for slot, load in brought:
            _note_load(slot, load)
        before_copies()
        return Restored(
            choice, tuple(loads), {load.user: load.first_token for load in loads}, self._load(loads, choice, pieces)
        )

    def _decide(self, slots: Sequence[Slot], brought: Sequence[tuple[Slot, Load]], pieces: Pieces | None) -> Choice:
        work = NOTHING
        if len(brought) < len(slots):
            loading = {slot.user_id for slot, _ in brought}
            others = [self._work(slot) for slot in slots if slot.user_id not in loading]
            work = Work(sum(each.rows for each in others), sum(each.pairs for each in others))
        return self._choose(pieces, [self._need(slot, load) for slot, load in brought], work)

    def _choose(self, pieces: Pieces | None, needs: Sequence[Need], others: Work) -> Choice:
        busy_s, offsets = self._mover.load_s(self._transfers.moving_bytes(LOAD)), self.watch.offsets
        layout = self._layout(pieces)
        return choose(self._costs, layout, needs, others, link_busy_s=busy_s, way=self.way, offsets=offsets)

    def _layout(self, pieces: Pieces | None) -> Layout:
        sizes = (self._layers, self._page_tokens, self._layer_bytes)
        if pieces is None:
            return Layout(*sizes)
        return Layout(*sizes, pieces.groups, pieces.run_pages, pieces.grouped / pieces.pages, pieces.parts)

    def _load(self, loads: Sequence[Load], choice: Choice, pieces: Pieces | None) -> Arrivals:
        self._transfers.began(LOAD, loads, page_bytes=self._layer_bytes * (self._layers - choice.first_layer))
        if choice.first_layer:
            self._open.update((load.ticket, None) for load in loads)
        try:
            return self._mover.submit_split(loads, choice.first_layer, pieces)
        except Exception:
            self._doomed.update(load.ticket for load in loads if load.ticket in self._open)
            raise

    def _end_all(self, loads: Sequence[Load]) -> None:
        for load in loads:
            self._index.end_load(load.ticket, False)

    def _need(self, slot: Slot, load: Load) -> Need:
        return Need(slot.encode_to, load.first_token, load.tokens, slot.candidates, self._frozen(slot))

    def _work(self, slot: Slot) -> Work:
        return user_work(slot.cached, slot.encode_to, slot.candidates, self._frozen(slot))

    def _frozen(self, slot: Slot) -> int:
        return slot.sequence.groups.frozen if self._frozen_sees_all else 0

    def withhold(self, finished: Sequence[Finished]) -> list[Finished]:
        """Those of the copies that ended whose end may be told to the index; loads of some layers wait for their batch."""
        told = []
        for copy in finished:
            if copy.kind != LOAD or copy.ticket not in self._open:
                told.append(copy)
            elif copy.ticket in self._doomed:
                self._end(copy.ticket, success=False)
            else:
                self._open[copy.ticket] = copy.error is None
        return told

    def end(self, restored: Restored | None, *, success: bool) -> None:
        """The batch is over; called before the index ends it. On success its arrivals have been waited for and polled."""
        for load in () if restored is None else restored.loads:
            if load.ticket not in self._open:
                continue
            copied = self._open[load.ticket]
            if copied is None:
                assert not success
                self._doomed.add(load.ticket)
                self._transfers.disown(load.user)  # no batch is to begin over it
            else:
                self._end(load.ticket, success=success and copied)

    def _end(self, ticket: int, *, success: bool) -> None:
        del self._open[ticket]
        self._doomed.discard(ticket)
        self._index.end_load(ticket, success)

    def waiting(self) -> int:
        """Loads whose copies are over, and that the index still counts as open."""
        return sum(copied is not None for copied in self._open.values())


def _note_load(slot: Slot, load: Load) -> None:
    for job in slot.jobs:
        job.loads += 1
        job.loaded_from = load.first_token if job.loaded_from < 0 else min(job.loaded_from, load.first_token)
