"""matplotlib, imported only when a plot is drawn, and what all plots look like."""

from __future__ import annotations

from typing import Any

from mtserve.errors import FailedPrecondition

GPU, HOST, ENCODED, BASELINE, INK = "#2a6fbb", "#e39b3b", "#c9ced6", "#8a929e", "#22262b"
STYLE = {
    "figure.figsize": (9.0, 4.8), "figure.dpi": 130, "font.size": 10.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#9aa1ab", "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": "#59616b", "ytick.color": "#59616b", "axes.grid": True, "grid.color": "#e7eaee",
    "axes.axisbelow": True, "legend.frameon": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.titlepad": 26.0,
}  # fmt: skip


def require_matplotlib() -> Any:
    """The pyplot module, without a display. Raises FailedPrecondition naming the extra that brings it."""
    try:
        import matplotlib
    except ImportError:
        raise FailedPrecondition(
            "plots need matplotlib; install mtserve with the extra [report]: pip install 'mtserve[report]'",
            field="report",
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
