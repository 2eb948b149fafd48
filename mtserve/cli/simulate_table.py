"""A study of caches as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtserve.config import EngineConfig
from mtserve.trace.simulate.capacities import Capacity
from mtserve.trace.simulate.cells import CellResult
from mtserve.trace.simulate.miss_ratio import TARGETS
from mtserve.trace.simulate.study import Pinned, Sizing, Study
from mtserve.units import format_bytes

HITS_NOTE = "requests by their slowest tier; optimum: the most that one tier of both sizes could find"
PINS_NOTE = "kept: states of pinned users that the budget covers at the end"
FORECAST_NOTE = """\
users: prefixes that the GPU tier holds; with as many requests in flight less is found than here: replay it
requests/s: never idle, batch after batch; ms: one request on an idle machine"""
TARGETS_NOTE = "-: not with any; best: nothing is evicted, only what is new is encoded"


def print_study(console: Console, study: Study) -> None:
    """Print what was simulated, each cell, and the memory that targets take."""
    console.print()
    for line in _head(study):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_hits(study))
    console.print(HITS_NOTE, soft_wrap=True)
    if study.pinned is not None:
        console.print()
        console.print(_by_pin(study))
        console.print(PINS_NOTE, soft_wrap=True)
    console.print()
    console.print(_forecast(study))
    console.print(FORECAST_NOTE, soft_wrap=True)
    if study.sizing is not None:
        console.print()
        console.print(_targets(study.sizing))
        console.print(f"{TARGETS_NOTE}; {_sampled(study.sizing)}", soft_wrap=True)


def _head(study: Study) -> list[str]:
    trace = study.trace
    kind = " (calibrated-synthetic)" if trace.meta.calibrated_synthetic else ""
    return [
        f"[bold]{escape(trace.meta.name)}[/]{kind}: {trace.requests:,} requests, {len(np.unique(trace.user)):,} users who ask",
        f"{escape(study.model.name)}: working set {format_bytes(study.working_set_bytes)} in pages of "
        f"{study.engine.page_tokens} tokens, {_formats(study.engine)}",
        *([] if study.pinned is None else [_pinned(study.pinned)]),
    ]


def _formats(engine: EngineConfig) -> str:
    both = engine.gpu_format != "native"
    return f"{engine.gpu_format} in both tiers" if both else f"{engine.host_format} on the host"


def _pinned(pinned: Pinned) -> str:
    return (
        f"pinned: {pinned.named:,} users, {pinned.unknown:,} of them unknown to the trace; {pinned.asking:,} ask and have "
        f"states of {format_bytes(pinned.working_set_bytes)}, of each tier they may keep {100 * pinned.budget:g}%"
    )


def _grid(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place > 2 else "left")
    return table


def _sizes(result: CellResult) -> tuple[str, str]:
    return _size(result.cell.gpu), _size(result.cell.host) if result.cell.host.pages else "-"


def _size(capacity: Capacity) -> str:
    """Its bytes, and the share that was asked for where it was one."""
    asked = f" ({capacity.text})" if "%" in capacity.text else ""
    return f"{format_bytes(capacity.bytes)}{asked}"


def _asked(result: CellResult) -> tuple[str, str]:
    return result.cell.gpu.text, result.cell.host.text


def _rows(study: Study, names: Callable[[CellResult], tuple[str, str]]) -> list[tuple[CellResult, list[str]]]:
    """Each cell with what its row begins with; its sizes only where they are new, below a line."""
    rows = []
    for sizes, results in groupby(study.cells, key=names):
        for place, result in enumerate(results):
            rows.append((result, [*(sizes if not place else ("", "")), result.cell.policy]))
    return rows


def _hits(study: Study) -> Table:
    columns = ("tokens: GPU/host/all", "optimum", "requests: GPU/host/all")
    table = _grid("Found, %", "GPU", "host", "policy", *columns)
    for result, start in _rows(study, _sizes):
        if start[0] and table.row_count:
            table.add_section()
        tokens, requests = (_tiers(result.hit_ratio[kind]) for kind in ("token", "request"))
        table.add_row(*start, tokens, f"{100 * result.optimum:.1f}", requests)
    return table


def _by_pin(study: Study) -> Table:
    columns = ("pinned: GPU/host/all", "others: GPU/host/all", "kept: GPU/host")
    table = _grid("Found of tokens, %, by users who are pinned and by others", "GPU", "host", "policy", *columns)
    for result, start in _rows(study, _asked):
        if start[0] and table.row_count:
            table.add_section()
        assert result.hit_ratio_by_pin is not None
        gpu, host = result.counters.gpu, result.counters.host
        kept = (gpu.pinned_pages * result.cell.gpu.page_bytes, host.pinned_pages * result.cell.host.page_bytes)
        ratios = (_tiers(result.hit_ratio_by_pin[who]["token"]) for who in ("pinned", "others"))
        table.add_row(*start, *ratios, " / ".join(map(format_bytes, kept)))
    return table


def _tiers(ratios: Mapping[str, float]) -> str:
    return " / ".join(f"{100 * ratios[tier]:4.1f}" for tier in ("gpu", "host", "total"))


def _forecast(study: Study) -> Table:
    table = _grid(
        f"Predicted for {study.machine}", "GPU", "host", "policy", "users", "requests/s", "p50, ms", "p99, ms", "loaded",
        "stored",
    )  # fmt: skip
    for result, start in _rows(study, _asked):
        if start[0] and table.row_count:
            table.add_section()
        predicted = result.forecast
        table.add_row(
            *start, f"{result.gpu_users:,.0f}", f"{predicted.requests_per_s:,.0f}", f"{predicted.p50_ms:.2f}", f"{predicted.p99_ms:.2f}",
            format_bytes(result.loaded_bytes), format_bytes(result.stored_bytes),
        )  # fmt: skip
    return table


def _targets(sizing: Sizing) -> Table:
    table = _grid("Memory for a token hit ratio after each user's first request, one tier", "policy")
    for target in TARGETS:
        table.add_column(f"{100 * target:g}%", justify="right")
    table.add_column("best, %", justify="right")
    for curve in sizing.curves:
        sizes = ("-" if each.pages is None else format_bytes(each.pages * sizing.page_bytes) for each in curve.answers)
        table.add_row(curve.policy, *sizes, f"{100 * curve.best:.2f}")
    return table


def _sampled(sizing: Sizing) -> str:
    if sizing.share == 1.0:
        return "from all users"
    return (
        f"from {sizing.users:,} sampled users with {100 * sizing.share:.1f}% of all pages; LRU's curve is off by "
        f"{100 * sizing.lru_error:.2f} points in the mean from that of all users"
    )
