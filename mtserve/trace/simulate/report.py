"""Plots of a study as PNG files, and its curves as JSON. matplotlib comes with the extra `report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mtserve.errors import InvalidArgument
from mtserve.trace.pyplot import INK, STYLE, require_matplotlib
from mtserve.trace.simulate.cells import CellResult
from mtserve.trace.simulate.miss_ratio import TARGETS, Curve
from mtserve.trace.simulate.optimum import OPTIMUM
from mtserve.trace.simulate.study import Sizing, Study
from mtserve.trace.simulate.summary import summarise_sizing
from mtserve.units import format_bytes

COLOURS = ("#2a6fbb", "#e39b3b", "#5aa38c", "#9a86b8", "#c65b5b", "#8a6d3b", "#4b9fd5", "#8a929e", "#d081a8")
GIB = 2**30


def write_study(study: Study, folder: str | Path) -> list[Path]:
    """Write the plots of `study`, and curves.json where it has curves, into `folder`, made where absent; their paths."""
    pyplot = require_matplotlib()
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be a folder: {error.strerror}", field="report") from None
    plots: dict[str, Callable[[Any, Study], None]] = {"hit_ratio": hit_ratio_over_time}
    paths = []
    if study.sizing is not None:
        plots |= {"miss_ratio": miss_ratio_curves, "memory": memory_for_targets}
        paths.append(target / "curves.json")
        paths[0].write_text(json.dumps(summarise_sizing(study.sizing), indent=2) + "\n", encoding="utf-8")
    with pyplot.rc_context(STYLE):
        for name, draw in plots.items():
            figure, axes = pyplot.subplots(layout="constrained")
            draw(axes, study)
            paths.append(target / f"{name}.png")
            figure.savefig(paths[-1])
            pyplot.close(figure)
    return paths


def miss_ratio_curves(axes: Any, study: Study) -> None:
    """Share of prefix tokens to encode, by bytes of one tier, each policy and the optimum."""
    sizing = _sizing(study)
    for curve, colour in _coloured(study, sizing):
        optimum = curve.policy == OPTIMUM
        axes.plot(
            curve.pages * sizing.page_bytes / GIB, 100 * (1 - curve.ratio),
            color=INK if optimum else colour, linewidth=1.6 if optimum else 2.0,
            linestyle=":" if optimum else "-", label=curve.policy,
        )  # fmt: skip
    axes.axvline(study.working_set_bytes / GIB, color="#9aa1ab", linewidth=1.0, linestyle=(0, (5, 3)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes)
    axes.set_xlabel("states that one tier holds, GiB (dashed: the working set)")
    axes.set_ylabel("prefix tokens not found, %")
    axes.set_title("Miss ratio by memory")
    sampled = (
        "" if sizing.share == 1.0 else f", {sizing.users:,} sampled users, LRU ±{100 * sizing.lru_error:.2f} points"
    )
    _subtitle(axes, f"{_setup(study)}{sampled}")
    axes.legend(loc="lower left")


def hit_ratio_over_time(axes: Any, study: Study) -> None:
    """Token hit ratio along the trace of each policy, in the middle size of the GPU tier and the least host tier."""
    shown = _middle(study)
    for result, colour in zip(shown, COLOURS, strict=False):
        count = len(result.over_time)
        places = (np.arange(count) + 0.5) * study.trace.requests / count
        axes.plot(places, 100 * np.array(result.over_time), color=colour, linewidth=1.8, label=result.cell.policy)
    axes.set_xlim(0, study.trace.requests)
    least = 100 * min(min(result.over_time) for result in shown)
    axes.set_ylim(max(0.0, least - 0.5 * (100 - least)), 100.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("requests of the trace")
    axes.set_ylabel("prefix tokens found, %")
    axes.set_title("Hit ratio over the trace")
    cell = shown[0].cell
    host = format_bytes(cell.host.bytes) if cell.host.pages else "none"
    _subtitle(axes, f"{_setup(study)}; GPU {format_bytes(cell.gpu.bytes)}, host {host}")
    axes.legend(loc="lower right")


def memory_for_targets(axes: Any, study: Study) -> None:
    """Bytes of one tier that reach each target, a bar a policy; none where no memory is enough."""
    sizing = _sizing(study)
    height = 0.8 / len(sizing.curves)
    for place, (curve, colour) in enumerate(_coloured(study, sizing)):
        optimum = curve.policy == OPTIMUM
        for row, answer in enumerate(curve.answers):
            y = row + place * height
            size = 0 if answer.pages is None else answer.pages * sizing.page_bytes
            label = curve.policy if row == 0 else None
            axes.barh(y, size / GIB, 0.9 * height, color=INK if optimum else colour, label=label)
            told = format_bytes(size) if size else f"not reached: at most {100 * curve.best:.2f}%"
            axes.text(size / GIB, y, f" {told}", va="center", fontsize=8.5)
    axes.set_yticks(np.arange(len(TARGETS)) + 0.4 - height / 2, [f"{100 * target:g}%" for target in TARGETS])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("states that one tier holds, GiB")
    axes.set_ylabel("token hit ratio after the first")
    axes.set_title("Memory for a hit ratio")
    _subtitle(axes, f"{_setup(study)}; requests but each user's first")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(sizing.curves))


def _sizing(study: Study) -> Sizing:
    assert study.sizing is not None
    return study.sizing


def _coloured(study: Study, sizing: Sizing) -> list[tuple[Curve, str]]:
    return [(curve, COLOURS[place % len(COLOURS)]) for place, curve in enumerate(sizing.curves)]


def _middle(study: Study) -> list[CellResult]:
    """The cells of one pair of sizes, a policy each."""
    gpus = sorted({result.cell.gpu.bytes for result in study.cells})
    gpu, host = gpus[len(gpus) // 2], min(result.cell.host.pages for result in study.cells)
    found = [result for result in study.cells if (result.cell.gpu.bytes, result.cell.host.pages) == (gpu, host)]
    return found or study.cells[-1:]


def _setup(study: Study) -> str:
    kind = ", calibrated-synthetic" if study.trace.meta.calibrated_synthetic else ""
    return f"{study.model.name} on {study.trace.meta.name}{kind}"


def _subtitle(axes: Any, text: str) -> None:
    axes.text(0, 1.025, text, transform=axes.transAxes, color="#59616b", fontsize=9.5)


def _plain(axes: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
