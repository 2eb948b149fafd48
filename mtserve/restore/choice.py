"""Load, recompute or split: which way brings the absent states of one batch's users soonest.

A split at layer k: the device encodes layers [0, k) of the absent tokens, while the link brings their layers [k, L);
from k on only new tokens and candidates are encoded. k = 0 loads everything, k = L recomputes. Two queues:

    link    link_busy_s, load_s, then layers k.. of most pages, in parts, then those of the others group by group
    device  batch_s and the planning of its first rows, then layer by layer. Layer l < k: all rows. Layer l >= k: once
            its group is there, the unpacking of what came, then the new rows

Unpacking takes the device's time as the layers do, so it does not matter that it may begin before they ask for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from mtserve.errors import InvalidArgument
from mtserve.restore.costs import Costs

AUTO, LOAD, RECOMPUTE, SPLIT = "auto", "load", "recompute", "split"
WAYS = (AUTO, LOAD, RECOMPUTE, SPLIT)


class Work(NamedTuple):
    """What one layer computes: rows, and the keys that they see in all."""

    rows: int
    pairs: int


NOTHING = Work(0, 0)


class Need(NamedTuple):
    """One user whose states only the host has: cached < host <= prefix, in tokens.

    `prefix`: of the request. `cached`: on the device. `host`: what there would be after a load. `candidates`: rows to
    score. `frozen`: tokens of U + S, which all see each other; 0 where attention is causal.
    """

    prefix: int
    cached: int
    host: int
    candidates: int
    frozen: int = 0


@dataclass(frozen=True)
class Layout:
    """How states lie and come. `layer_bytes`: what one layer of one page takes on the link.

    `groups`: first layer of each group that comes together, the first of them 0; empty: each layer alone. `run_pages`:
    neighbouring pages that one copy takes, in the mean. `grouped`: share of the pages that comes so; before them the
    others come with all their layers, in `parts`. `splits`: layers at which a split may be; None: at any.
    """

    layers: int
    page_tokens: int
    layer_bytes: int
    groups: tuple[int, ...] = ()
    run_pages: float = 1.0
    grouped: float = 1.0
    parts: int = 1
    splits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.layers >= 1 and self.page_tokens >= 1 and self.layer_bytes >= 1 and self.run_pages >= 1
        assert 0 <= self.grouped <= 1 and self.parts >= 1
        groups = self.groups or tuple(range(self.layers))
        assert groups[0] == 0 and groups[-1] < self.layers and all(first < last for first, last in pairwise(groups))
        splits = range(1, self.layers) if self.splits is None else self.splits
        assert all(0 < layer < self.layers for layer in splits)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "splits", tuple(sorted(set(splits))))

    def pages(self, need: Need) -> int:
        """Pages that a load brings: whole ones, that of the last cached token among them where it is not full."""
        return -(-need.host // self.page_tokens) - need.cached // self.page_tokens


@dataclass(frozen=True)
class Choice:
    """The way of one batch. `first_layer`: the first that is loaded; the number of layers where nothing is.

    `predicted_s`: from the decision to the end of the last layer, of which `offset_s` are what batches of late took beyond
    what was modelled. `by_way`: the prediction for each way that there is.
    """

    first_layer: int
    predicted_s: float
    way: str
    by_way: dict[str, float] = field(compare=False)
    offset_s: float = 0.0


def user_work(first: int, prefix: int, candidates: int, frozen: int = 0) -> Work:
    """Of one user: tokens [first, prefix) and the candidates, each of which sees the prefix and itself."""
    return Work(prefix - first + candidates, _pairs(first, prefix, frozen) + candidates * (prefix + 1))


def choose(
    costs: Costs,
    layout: Layout,
    needs: Sequence[Need],
    others: Work,
    *,
    link_busy_s: float = 0.0,
    way: str = AUTO,
    offsets: Mapping[str, float] | None = None,
) -> Choice:
    """The way of a batch that is to restore `needs`, beside `others`: what every layer computes anyway.

    `link_busy_s`: what the link has to bring before. `offsets`: seconds to add to each way's model. `way`: "auto", the
    soonest, and recompute where that is as soon; else as named, but recompute where there is no such way: without needs,
    a split of a single layer. Where nothing is known of the link, the soonest is recompute, and what is said of a way
    that was named leaves the link's time out.
    Raises InvalidArgument for a `way` that is none.
    """
    if way not in WAYS:
        raise InvalidArgument(f"{way!r} is not one of {', '.join(WAYS)}", field="restore")
    layers, added = layout.layers, offsets or {}
    course = _Course(costs, layout, needs, others, link_busy_s)
    found = {RECOMPUTE: (course.end_s(layers), layers)}
    if needs and (costs.link or way != AUTO):
        # The last of equals loads least.
        splits = [(course.end_s(layer), layer) for layer in reversed(layout.splits or ())]
        if splits:
            found[SPLIT] = min(splits, key=itemgetter(0))
        found[LOAD] = (course.end_s(0), 0)
    by_way = {name: end_s + added.get(name, 0.0) for name, (end_s, _) in found.items()}
    best = min(by_way, key=by_way.__getitem__) if way == AUTO else way if way in found else RECOMPUTE
    return Choice(found[best][1], by_way[best], best, by_way, added.get(best, 0.0))


class _Course:
    """How one batch would go."""

    def __init__(self, costs: Costs, layout: Layout, needs: Sequence[Need], others: Work, link_busy_s: float) -> None:
        absent_rows = absent_pairs = pages = 0
        rows, pairs = others
        for need in needs:
            prefix, cached, host, candidates, frozen = need
            assert 0 <= cached < host <= prefix and candidates >= 0 and frozen >= 0
            absent_rows += host - cached
            absent_pairs += _pairs(cached, host, frozen)
            rows += prefix - host + candidates
            pairs += _pairs(host, prefix, frozen) + candidates * (prefix + 1)
            pages += layout.pages(need)
        self._costs, self._layout = costs, layout
        self._grouped_pages = pages * layout.grouped
        self._bulk_pages = pages - self._grouped_pages
        self._link_from = link_busy_s + costs.load_s
        self._new_rows, self._all_rows = rows, rows + absent_rows
        self._whole_s = costs.compute_s(rows + absent_rows, pairs + absent_pairs)
        unpack_s = costs.unpack_s * layout.page_tokens
        self._bulk_unpack_s = self._bulk_pages * unpack_s  # a layer
        self._loaded_s = costs.compute_s(rows, pairs) + self._grouped_pages * unpack_s
        self._piece_s: dict[int, float] = {}  # layers of a group -> seconds in which the link brings it
        self._ends = (*layout.groups[1:], layout.layers)
        # Of what comes after each group: seconds from the device's being done with it, and from the link's, to the end.
        self._after = [(0.0, 0.0)] * len(self._ends)
        for group in range(len(self._ends) - 1, 0, -1):
            self._after[group - 1] = self._rest_s(group, self._ends[group] - layout.groups[group])

    def end_s(self, first_layer: int) -> float:
        """When the last layer is done, if layers from `first_layer` on are loaded."""
        first_rows = self._all_rows if first_layer else self._new_rows
        encoded = self._costs.batch_s + first_rows * self._costs.plan_row_s + first_layer * self._whole_s
        if first_layer == self._layout.layers:
            return encoded
        group = bisect_right(self._layout.groups, first_layer) - 1
        device_s, link_s = self._rest_s(group, self._ends[group] - first_layer)
        bulk_s, unpack_s, parts = self._bulk_s(first_layer), self._unpack_s(first_layer), self._layout.parts
        # Of the parts, that which decides is the first, behind which all is unpacked, or the last.
        bulk_ends = bulk_s / parts + unpack_s, bulk_s + unpack_s / parts
        begins = max(encoded + unpack_s, *(self._link_from + end for end in bulk_ends))
        return max(begins + device_s, self._link_from + bulk_s + link_s)

    def _bulk_s(self, first_layer: int) -> float:
        """Seconds in which the link brings what comes before the groups."""
        if not self._bulk_pages or not self._costs.link:
            return 0.0
        width = (self._layout.layers - first_layer) * self._layout.layer_bytes
        return self._bulk_pages * width / self._costs.bytes_per_s(int(width * self._layout.run_pages))

    def _unpack_s(self, first_layer: int) -> float:
        return (self._layout.layers - first_layer) * self._bulk_unpack_s

    def _rest_s(self, group: int, layers: int) -> tuple[float, float]:
        """As `_after`, from before the last `layers` of `group` on. The later of the two ways decides the end."""
        arrival_s, work_s = self._arrival_s(layers), layers * self._loaded_s
        device_s, link_s = self._after[group]
        return work_s + device_s, arrival_s + max(work_s + device_s, link_s)

    def _arrival_s(self, layers: int) -> float:
        if not self._costs.link:
            return 0.0
        known = self._piece_s.get(layers)
        if known is None:
            width = layers * self._layout.layer_bytes
            # Behind whole pages come few, too few for runs.
            run_pages = self._layout.run_pages if self._layout.grouped == 1 else 1.0
            known = self._grouped_pages * width / self._costs.bytes_per_s(int(width * run_pages))
            self._piece_s[layers] = known
        return known


def _pairs(first: int, last: int, frozen: int) -> int:
    """Keys that prefix tokens [first, last) see in all: all `frozen` ones, and behind those each up to itself."""
    inside = max(0, min(last, frozen) - first) * frozen
    first, last = max(first, frozen), max(last, frozen)
    return inside + (last * (last + 1) - first * (first + 1)) // 2
