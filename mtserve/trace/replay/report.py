"""Plots of a replay. Needs matplotlib, which the extra [report] brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.engine.stopwatch import PHASES
from mtserve.errors import InvalidArgument
from mtserve.trace.hits import TIER_NAMES, hit_ratio
from mtserve.trace.pyplot import BASELINE, ENCODED, GPU, HOST, INK, STYLE, require_matplotlib
from mtserve.trace.replay.run_log import RunLog
from mtserve.trace.replay.runs import ReplayResult
from mtserve.trace.replay.summary import summarise, time_spent
from mtserve.units import format_bytes

BINS = 60
PHASE_COLOURS = dict(zip(PHASES, ("#9a86b8", HOST, "#7fb2e0", GPU, "#5aa38c", "#e3e6eb"), strict=True))
UNDER_WAY = {"batches": "batches", "load": "loads", "store": "stores"}


def write_report(result: ReplayResult, folder: str | Path) -> list[Path]:
    """Write the PNGs of a replay into `folder`, which is made where absent; returns their paths."""
    pyplot = require_matplotlib()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be a folder: {error.strerror}", field="report") from None
    plots: dict[str, Callable[[Any, ReplayResult], None]] = {
        "latency_cdf": latency_cdf, "hit_ratio": hit_ratio_over_time,
        "tokens_by_tier": tokens_by_tier, "memory": memory_use, "time": time_by_phase,
    }  # fmt: skip
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in plots.items():
            figure, axes = pyplot.subplots(layout="constrained")
            draw(axes, result)
            paths.append(Path(folder) / f"{name}.png")
            figure.savefig(paths[-1])
            pyplot.close(figure)
    return paths


def _subtitle(axes: Any, text: str) -> None:
    axes.text(0, 1.025, text, transform=axes.transAxes, color="#59616b", fontsize=9.5)


def _setup(result: ReplayResult) -> str:
    loop = f"open loop at {result.config.speed:g}x" if result.open_loop else f"{result.config.concurrency} in flight"
    chaos = f", chaos {result.engine.chaos}" if result.engine.chaos else ""
    return f"{result.model.config.name}, {result.dtype} on {result.device}, {loop}{chaos}"


def latency_cdf(axes: Any, result: ReplayResult) -> None:
    """Share of requests answered within a time, both runs."""
    runs = [(result.baseline, "without cache", BASELINE), (result.cached, "with cache", GPU)]
    for run, name, colour in runs:
        if run is None or not run.done.any():
            continue
        times = np.sort(run.latency_s[run.done]) * 1000
        shares = np.arange(1, len(times) + 1) / len(times)
        axes.plot(times, shares, color=colour, linewidth=2.2, drawstyle="steps-post")
        p50 = float(np.percentile(times, 50))
        axes.plot([p50], [0.5], "o", color=colour, markersize=6)
        axes.plot([], [], color=colour, linewidth=2.2, label=f"{name}: p50 {p50:,.1f} ms")
    axes.set_xscale("log")
    _plain_log_ticks(axes)
    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel("latency, ms" + (" from scheduled arrival" if result.open_loop else ""))
    axes.set_ylabel("requests answered within")
    axes.set_title("Latency")
    _subtitle(axes, _setup(result))
    axes.legend(loc="upper left")


def _plain_log_ticks(axes: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.0f}%"


def _bins(result: ReplayResult) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """(bin of each request, centre of each bin in requests): the trace in up to BINS equal parts."""
    requests = result.cached.requests
    count = min(BINS, max(1, requests // 4))
    edges = np.linspace(0, requests, count + 1)
    return np.minimum(np.arange(requests) * count // requests, count - 1), (edges[:-1] + edges[1:]) / 2


def hit_ratio_over_time(axes: Any, result: ReplayResult) -> None:
    """Requests by slowest tier along the trace, stacked, with the token hit ratio as a line."""
    run, (bins, centres) = result.cached, _bins(result)
    totals = np.maximum(1, np.bincount(bins, weights=run.done, minlength=len(centres)))
    shares = [
        np.bincount(bins, weights=run.tier == TIER_NAMES.index(t), minlength=len(centres)) / totals
        for t in ("gpu", "host")
    ]
    width = run.requests / len(centres)
    axes.bar(centres, shares[0], width, color=GPU, label="requests found on the GPU")
    axes.bar(centres, shares[1], width, bottom=shares[0], color=HOST, label="requests found on the host")
    prefix = np.maximum(1, np.bincount(bins, weights=run.prefix_tokens, minlength=len(centres)))
    tokens = np.bincount(bins, weights=run.gpu_tokens + run.host_tokens, minlength=len(centres)) / prefix
    axes.plot(centres, tokens, color=INK, linewidth=1.8, label="prefix tokens found")
    axes.set_xlim(0, run.requests)
    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel("requests of the trace")
    axes.set_ylabel("hit ratio")
    axes.set_title("Hit ratio over the trace")
    ratios = hit_ratio(run)
    _subtitle(
        axes,
        f"{_setup(result)}; {100 * ratios['request']['total']:.1f}% of requests, "
        f"{100 * ratios['token']['total']:.1f}% of tokens; GPU {_capacity(result, 'gpu')}, host {_capacity(result, 'host')}",
    )
    _legend_below(axes, 3)


def _capacity(result: ReplayResult, tier: str) -> str:
    return format_bytes(result.cached.stats["tiers"][tier]["capacity_bytes"])


def _legend_below(axes: Any, columns: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)


def tokens_by_tier(axes: Any, result: ReplayResult) -> None:
    """Prefix tokens per request along the trace: what was found where, and what had to be encoded."""
    run, (bins, centres) = result.cached, _bins(result)
    requests = np.maximum(1, np.bincount(bins, weights=run.done, minlength=len(centres)))
    encoded = run.prefix_tokens - run.gpu_tokens - run.host_tokens
    bottom, width = np.zeros(len(centres)), run.requests / len(centres)
    for values, name, colour in ((run.gpu_tokens, "found on the GPU", GPU), (run.host_tokens, "found on the host", HOST),
                                 (encoded, "encoded", ENCODED)):  # fmt: skip
        heights = np.bincount(bins, weights=values, minlength=len(centres)) / requests
        axes.bar(centres, heights, width, bottom=bottom, color=colour, label=name)
        bottom += heights
    axes.set_xlim(0, run.requests)
    axes.set_xlabel("requests of the trace")
    axes.set_ylabel("prefix tokens of a request, mean")
    axes.set_title("Prefix tokens by tier")
    _subtitle(axes, _setup(result))
    _legend_below(axes, 3)


def memory_use(axes: Any, result: ReplayResult) -> None:
    """Bytes held by each tier along the trace, with their capacities."""
    summary = summarise(result)["memory"]
    samples = result.cached.samples
    unit, scale = next(
        (u, s)
        for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
        if summary["working_set_bytes"] >= s or u == "KiB"
    )
    answered = [0, *(sample.answered for sample in samples)]
    for name, place, colour in (("gpu", 2, GPU), ("host", 3, HOST)):
        used = [0.0, *(sample[place] * summary[name]["page_bytes"] / scale for sample in samples)]
        label = {"gpu": "GPU tier", "host": "host tier"}[name]
        axes.plot(answered, used, color=colour, linewidth=2.2, label=label)
        capacity = summary[name]["capacity_bytes"] / scale
        if capacity:
            axes.axhline(capacity, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), label=f"{label}, capacity")
    axes.axhline(summary["working_set_bytes"] / scale, color=INK, linewidth=1.2, linestyle=":", label="working set")
    axes.set_xlim(0, result.cached.requests)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests answered")
    axes.set_ylabel(f"states held, {unit}")
    axes.set_title("Memory of the tiers")
    _subtitle(axes, f"{_setup(result)}; {summary['gpu']['evicted_pages']:,} pages evicted from the GPU, "
                    f"{summary['host']['evicted_pages']:,} from the host")  # fmt: skip
    _legend_below(axes, 5)


def time_by_phase(axes: Any, result: ReplayResult) -> None:
    """Phases of each run's loop as shares of its wall time; below them, how much of it had work under way."""
    runs = [(result.cached, "with cache")] + ([] if result.baseline is None else [(result.baseline, "without cache")])
    places, names, bottom = [], [], 0.0
    for run, name in runs:
        _draw_phases(axes, run, bottom)
        places.append(bottom)
        capped = f"\n(first {run.requests:,} requests)" if run.requests < result.cached.requests else ""
        names.append(f"{name}, {run.seconds:,.2f} s{capped}")
        bottom += 0.74
        for kind, name in UNDER_WAY.items() if run.stats["transfers"] else [("batches", UNDER_WAY["batches"])]:
            _draw_under_way(axes, time_spent(run), kind, bottom)
            places.append(bottom)
            names.append(f"{name} under way")
            bottom += 0.38
        bottom += 0.5
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom - 0.65, -0.55)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(_percent)
    axes.set_xlabel("share of the run's wall time; what is under way overlaps")
    axes.set_title("Where the time went")
    _subtitle(axes, _setup(result))
    _legend_below(axes, len(PHASES))


def _draw_phases(axes: Any, run: RunLog, place: float) -> None:
    left = 0.0
    for phase, seconds in time_spent(run)["loop"].items():
        share = seconds / run.seconds
        axes.barh(place, share, 0.8, left=left, color=PHASE_COLOURS[phase], label="" if place else phase)
        if share >= 0.05:
            ink = "white" if phase == "device" else INK
            axes.text(left + share / 2, place, _percent(share, 0), ha="center", va="center", color=ink, fontsize=9.5)
        left += share


def _draw_under_way(axes: Any, time: dict[str, Any], kind: str, place: float) -> None:
    share, speed = time[f"{kind}_s"] / time["wall_s"], time.get(f"{kind}_gb_per_s")
    axes.barh(place, 1, 0.18, color="#eef0f3")
    axes.barh(place, share, 0.18, color=BASELINE)
    told = _percent(share, 0) + (f", {speed:.3g} GB/s" if speed else "")
    axes.text(1.01, place, told, va="center", fontsize=9.5)
