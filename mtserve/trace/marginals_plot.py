"""A drawing of a trace's marginals over the published ones. Needs matplotlib, which the extra [report] brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.trace.burstiness import WINDOWS_S
from mtserve.trace.calendar import HOUR_MS
from mtserve.trace.calibration import (
    ACTIVITY_SIGMA,
    EBNERD,
    GAP_LABELS,
    HISTORY_SIGMA,
    HOURLY_LOAD,
    KUAIRAND,
    Z,
)
from mtserve.trace.marginals import AZURE_NAMES, EBNERD_NAME, KUAIRAND_NAME
from mtserve.trace.pyplot import BASELINE, GPU, HOST, INK, STYLE, require_matplotlib
from mtserve.trace.schema import Trace

HERE, PUBLISHED, OTHER = GPU, HOST, "#5aa38c"
SMALL = {"figure.figsize": (15.0, 14.0), "figure.dpi": 110, "font.size": 9.5, "axes.titlepad": 8.0}
MOST_BARS = 1_000

Facts = dict[str, Any]


def write_marginals(trace: Trace, facts: Facts, folder: str | Path) -> Path:
    """Draw `facts`, what `info.info` found in `trace`, as marginals.png in `folder`, made where absent.

    Raises FailedPrecondition without matplotlib, InvalidArgument where `folder` cannot be one.
    """
    pyplot = require_matplotlib()
    path = Path(folder) / "marginals.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be a folder: {error.strerror}", field="report") from None
    panels: list[Callable[[Any, Trace, Facts], None]] = [
        _activity, _histories, _gaps, _hours, _load_variance, _candidates, _clicks, _load_over_time,
    ]  # fmt: skip
    with pyplot.rc_context({**STYLE, **SMALL}):
        figure, axes = pyplot.subplots(4, 2, layout="constrained")
        for draw, panel in zip(panels, axes.flat, strict=True):
            draw(panel, trace, facts)
            if panel.get_legend_handles_labels()[0]:
                panel.legend()
        kind = "calibrated-synthetic" if facts["calibrated_synthetic"] else "as recorded"
        figure.suptitle(f"{facts['name']} ({kind}): {trace.requests:,} requests of {trace.users:,} users", color=INK)
        figure.savefig(path)
        pyplot.close(figure)
    return path


def _above(axes: Any, values: npt.NDArray[Any], label: str) -> None:
    """The share of `values` that are at least x, both on log scales."""
    ranked = np.sort(values[values > 0])
    if len(ranked):
        axes.plot(ranked, 1 - np.arange(len(ranked)) / len(ranked), color=HERE, linewidth=2, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.3)


def _quantiles(axes: Any, figures: dict[str, float], scale: float, colour: str, label: str) -> None:
    known = [(q, figures[f"p{q}"] * scale) for q in (50, 95, 99) if f"p{q}" in figures]
    axes.plot([value for _, value in known], [1 - q / 100 for q, _ in known], "o", color=colour, label=label)


def _lognormal(axes: Any, median: float, sigma: float) -> None:
    values = median * np.exp(sigma * np.array([Z[q] for q in (50, 95, 99)]))
    axes.plot(values, [0.5, 0.05, 0.01], "--", color=PUBLISHED, linewidth=1, label="lognormal fitted to it")


def _activity(axes: Any, trace: Trace, facts: Facts) -> None:
    _above(axes, np.bincount(trace.user, minlength=trace.users), "this trace")
    # Published are exposures, so only the shape can be compared: the medians are laid on one another.
    exposures = KUAIRAND["exposures_per_user"]
    median = max(facts["requests_per_user"]["p50"], 1)
    _quantiles(axes, exposures, median / exposures["p50"], PUBLISHED, f"{KUAIRAND_NAME}, same median")
    _lognormal(axes, median, ACTIVITY_SIGMA)
    _quantiles(axes, EBNERD["requests_per_user"], 1.0, OTHER, EBNERD_NAME)
    axes.set_title("Activity: share of users with at least so many requests")


def _histories(axes: Any, trace: Trace, facts: Facts) -> None:
    _above(axes, trace.history_lengths, "this trace")
    _quantiles(axes, KUAIRAND["clicks_per_user"], 1.0, PUBLISHED, f"{KUAIRAND_NAME}, clicks")
    _lognormal(axes, KUAIRAND["clicks_per_user"]["p50"], HISTORY_SIGMA)
    _quantiles(axes, EBNERD["history"], 1.0, OTHER, EBNERD_NAME)
    axes.set_title("Histories: share of users with at least so many behaviours before the trace")


def _pairs(axes: Any, here: list[float], published: list[float], labels: list[str], name: str) -> None:
    places = np.arange(len(labels))
    axes.bar(places - 0.2, here, 0.38, color=HERE, label="this trace")
    axes.bar(places + 0.2, published, 0.38, color=PUBLISHED, label=name)
    axes.set_xticks(places, labels)


def _gaps(axes: Any, trace: Trace, facts: Facts) -> None:
    here = [facts["gap_s"]["shares"][label] for label in GAP_LABELS]
    _pairs(axes, here, list(KUAIRAND["gap_shares"]), list(GAP_LABELS), KUAIRAND_NAME)
    axes.set_title("Gaps between a user's requests: share of all")


def _hours(axes: Any, trace: Trace, facts: Facts) -> None:
    hours = np.arange(24)
    axes.bar(hours, facts["load_by_hour"]["shares"], 0.8, color=HERE, label="this trace")
    axes.plot(hours, HOURLY_LOAD, "o-", color=PUBLISHED, label=f"{KUAIRAND_NAME} (peak and trough published)")
    axes.set_title("Load by hour of the day (UTC), in shares of the mean")


def _load_variance(axes: Any, trace: Trace, facts: Facts) -> None:
    azure = facts["calibration"]["azure"]
    lines = [
        (facts["bursts"]["requests"], "requests of this trace", HERE, "o-"),
        (facts["bursts"]["sessions"], "starts of its sessions", HERE, "o:"),
        *((azure[service], name, colour, "s--") for (service, name), colour in
          zip(AZURE_NAMES.items(), (PUBLISHED, OTHER), strict=True)),
    ]  # fmt: skip
    for figures, label, colour, style in lines:
        known = [(w, figures["load_variance"][str(w)]) for w in WINDOWS_S]
        known = [(w, variance) for w, variance in known if variance is not None and variance > 0]
        axes.plot([w for w, _ in known], [v for _, v in known], style, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(WINDOWS_S, [f"{window} s" for window in WINDOWS_S])
    axes.set_title("Bursts: variance of the load over windows, relative to its mean squared")


def _counts(axes: Any, lengths: npt.NDArray[Any], mean: float) -> None:
    """A histogram of whole numbers, with the published mean and the own one."""
    if not len(lengths):
        return
    top = max(int(np.percentile(lengths, 99.5)), 1)
    counts = np.bincount(np.minimum(lengths, top), minlength=top + 1) / len(lengths)
    if top <= MOST_BARS:
        axes.bar(np.arange(top + 1), counts, 0.9, color=HERE)
    else:
        axes.plot(np.arange(top + 1), counts, color=HERE)
    axes.axvline(lengths.mean(), color=INK, linewidth=1.5, label=f"mean {lengths.mean():.3g}")
    axes.axvline(mean, color=PUBLISHED, linewidth=1.5, linestyle="--", label=f"{KUAIRAND_NAME}, mean {mean:.3g}")


def _candidates(axes: Any, trace: Trace, facts: Facts) -> None:
    _counts(axes, trace.cand_lengths, KUAIRAND["candidates_mean"])
    for q, value in EBNERD["candidates"].items():
        axes.axvline(value, color=OTHER, linewidth=1, linestyle=":", label=f"{EBNERD_NAME}, {q} {value}")
    axes.set_title("Candidates of a request: share of requests")


def _clicks(axes: Any, trace: Trace, facts: Facts) -> None:
    _counts(axes, trace.clicked_lengths, KUAIRAND["clicks_mean"])
    axes.set_title("Clicks of a request: share of requests")


def _load_over_time(axes: Any, trace: Trace, facts: Facts) -> None:
    if trace.requests:
        hours = np.bincount((trace.t_ms - trace.t_ms[0]) // HOUR_MS)
        axes.fill_between(np.arange(len(hours)) / 24, hours, step="post", color=BASELINE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("days")
    axes.set_title("Requests of each hour")
