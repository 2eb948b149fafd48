"""Load, recompute or split: which way brings the absent states of one batch's users soonest.

A split at layer k: the device encodes layers [0, k) of the absent tokens, while the link brings their layers [k, L);
from k on only new tokens and candidates are encoded. k = 0 loads everything, k = L recomputes. Two queues:

    link    link_busy_s, load_s, then layers k.. of most pages, in parts, then those of the others group by group
    device  batch_s and the planning of its first rows, then layer by layer. Layer l < k: all rows. Layer l >= k: once
            its group is there, the unpacking of what came, then the new rows

Unpacking takes the device's time as the layers do, so it does not matter that it may begin before they ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from mtserve import _core
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
        if not self.groups:
            object.__setattr__(self, "groups", tuple(range(self.layers)))
        assert self.splits is None or all(0 < layer < self.layers for layer in self.splits)

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
    ends = _core._restore_ends(
        costs.core, layers, layout.page_tokens, layout.layer_bytes, layout.groups, layout.run_pages, layout.grouped,
        layout.parts, list(chain.from_iterable(needs)), *others, link_busy_s,
    )  # fmt: skip
    found = {RECOMPUTE: (ends[layers], layers)}
    if needs and (costs.link or way != AUTO):
        splits = range(1, layers) if layout.splits is None else sorted(layout.splits)
        if splits:
            layer = min(reversed(splits), key=ends.__getitem__)  # the last of equals loads least
            found[SPLIT] = (ends[layer], layer)
        found[LOAD] = (ends[0], 0)
    by_way = {name: end_s + added.get(name, 0.0) for name, (end_s, _) in found.items()}
    best = min(by_way, key=by_way.__getitem__) if way == AUTO else way if way in found else RECOMPUTE
    return Choice(found[best][1], by_way[best], best, by_way, added.get(best, 0.0))


def _pairs(first: int, last: int, frozen: int) -> int:
    """Keys that prefix tokens [first, last) see in all: all `frozen` ones, and behind those each up to itself."""
    inside = max(0, min(last, frozen) - first) * frozen
    first, last = max(first, frozen), max(last, frozen)
    return inside + (last * (last + 1) - first * (first + 1)) // 2
