"""Random costs, layouts and needs, and the two queues run event by event."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mtserve.restore.choice import Layout, Need, Work, user_work
from mtserve.restore.costs import Costs

PIECES = (64 << 10, 256 << 10, 1 << 20, 16 << 20)


def random_costs(rng: np.random.Generator, **changes: float) -> Costs:
    """A plausible GPU: now the link is sooner, now the device."""
    link_rate = 10 ** rng.uniform(8, 12)
    shares = (0.5, 0.7, 0.9, 1.0)
    figures = {
        "load_s": 10 ** rng.uniform(-6, -4),
        "batch_s": 10 ** rng.uniform(-6, -3),
        "layer_s": 10 ** rng.uniform(-6, -4),
        "row_s": 10 ** rng.uniform(-9, -6),
        "pair_s": 10 ** rng.uniform(-13, -10),
        "unpack_s": float(rng.choice([0.0, 10 ** rng.uniform(-11, -7)])),
    }
    link = tuple((size, link_rate * share) for size, share in zip(PIECES, shares, strict=True))
    return Costs(link=link, **{**figures, **changes})


def random_layout(rng: np.random.Generator) -> Layout:
    layers = int(rng.integers(1, 13))
    groups = (0, *sorted(set(rng.integers(1, layers, rng.integers(0, 5)).tolist()))) if layers > 1 else (0,)
    run_pages = float(rng.choice([1.0, 2.5, 16.0]))
    shape = (layers, int(rng.choice([4, 64])), 128 << 10, groups if rng.random() < 0.7 else (), run_pages)
    return Layout(*shape, grouped=float(rng.choice([1.0, 0.25, 0.6])), parts=int(rng.integers(1, 5)))


def random_needs(rng: np.random.Generator) -> list[Need]:
    needs = []
    for _ in range(int(rng.integers(1, 9))):
        prefix = int(rng.integers(1, 5000))
        host = int(rng.integers(1, prefix + 1))
        cached = int(rng.choice([0, rng.integers(0, host)]))
        needs.append(
            Need(prefix, cached, host, int(rng.integers(0, 300)), int(rng.choice([0, rng.integers(0, prefix)])))
        )
    return needs


def random_others(rng: np.random.Generator) -> Work:
    return user_work(100, 100 + int(rng.integers(0, 2000)), 50)


def visible_keys(need: Need, first: int, last: int) -> int:
    """Keys that prefix tokens [first, last) see, one by one."""
    return sum(need.frozen if token < need.frozen else token + 1 for token in range(first, last))


def simulate(costs: Costs, layout: Layout, needs: list[Need], others: Work, busy_s: float, first_layer: int) -> float:
    """When the last layer is done. The device unpacks whatever has come as soon as it ends what it does, and idles only
    while it can do nothing.
    """
    bounds = sorted({first_layer, *(group for group in layout.groups if group > first_layer), layout.layers})
    absent = Work(
        sum(need.host - need.cached for need in needs),
        sum(visible_keys(need, need.cached, need.host) for need in needs),
    )
    rows = others.rows + sum(need.prefix - need.host + need.candidates for need in needs)
    pairs = others.pairs + sum(
        visible_keys(need, need.host, need.prefix) + need.candidates * (need.prefix + 1) for need in needs
    )
    pages = sum(-(-need.host // layout.page_tokens) - need.cached // layout.page_tokens for need in needs)
    grouped = pages * layout.grouped
    unpack_s = costs.unpack_s * layout.page_tokens  # of a page's layer

    to_unpack: list[tuple[float, float, int]] = []  # when it comes, pages' layers, before which layer all is there then
    link_at, loaded = busy_s + costs.load_s, layout.layers - first_layer
    for _ in range(layout.parts if layout.grouped < 1 and loaded else 0):
        width, part = loaded * layout.layer_bytes, (pages - grouped) / layout.parts
        link_at += part * width / costs.bytes_per_s(int(width * layout.run_pages))
        to_unpack.append((link_at, part * loaded, first_layer))
    for first, last in pairwise(bounds):
        width = (last - first) * layout.layer_bytes
        run_pages = layout.run_pages if layout.grouped == 1 else 1
        link_at += grouped * width / costs.bytes_per_s(int(width * run_pages))
        to_unpack.append((link_at, grouped * (last - first), last))

    now, layer, ready = costs.batch_s, 0, first_layer
    while layer < layout.layers:
        if to_unpack and to_unpack[0][0] <= now:
            _, count, ready = to_unpack.pop(0)
            now += unpack_s * count
        elif layer < ready:
            extra = absent if layer < first_layer else Work(0, 0)
            now += costs.layer_s + (rows + extra.rows) * costs.row_s + (pairs + extra.pairs) * costs.pair_s
            layer += 1
        else:
            now = to_unpack[0][0]
    return now
