"""The table and the drawing of a trace's marginals beside the published ones."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from trace_samples import sample_trace

from mtserve.cli import main
from mtserve.errors import InvalidArgument
from mtserve.trace.calibration import AZURE, KUAIRAND
from mtserve.trace.generator.bursts import BurstConfig
from mtserve.trace.generator.clock import WeekConfig
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.info import info, info_text
from mtserve.trace.io import write_trace
from mtserve.trace.marginals import Marginal, marginals, marginals_text
from mtserve.trace.marginals_plot import write_marginals
from mtserve.trace.schema import Trace


def bursty() -> Trace:
    return generate(
        GeneratorConfig(
            users=300, requests=30_000, days=9, history_median=20, week=WeekConfig(weekend=0.5),
            bursts=BurstConfig(like="code", moves="requests"),
        )
    )  # fmt: skip


def test_the_difference_is_relative_to_what_was_published() -> None:
    assert Marginal("x", 3.0, 2.0).difference == pytest.approx(0.5)
    assert Marginal("x", 3.0).difference is None
    assert Marginal("x", None, 2.0).difference is None
    lines = marginals_text(
        [Marginal("x", 1.999, 2.0, "there"), Marginal("y", 1234.5), Marginal("z", 1.0, 2.0, "there")]
    )
    assert [line.split() for line in lines[1:]] == [
        ["x", "2", "2", "+0%", "there"],
        ["y", "1,234", "-", "-"],
        ["z", "1", "2", "-50%", "there"],
    ]


def test_every_published_figure_that_the_generator_is_fitted_to_has_its_row() -> None:
    rows = marginals(info(bursty()))
    figures = {(row.label, row.of): row for row in rows}
    assert len(figures) == len(rows)
    for label, published in (
        ("candidates, mean", KUAIRAND["candidates_mean"]),
        ("clicks, mean", KUAIRAND["clicks_mean"]),
        ("gaps of 1-10 s", KUAIRAND["gap_shares"][0]),
        ("load by hour, peak", KUAIRAND["load_peak"]),
        ("share of the top 10% of users", KUAIRAND["top_10_percent_share"]),
    ):
        assert figures[label, "KuaiRand-27K"].published == published
    for window in ("1", "10", "60", "300"):
        row = figures[f"load variance, {window} s, requests", "Azure code"]
        assert row.published == AZURE["code"]["load_variance"][window]
        assert row.here is not None
        assert row.here == pytest.approx(row.published, rel=1.0)
    weekend = figures["load of a weekend day / weekday", ""].here
    assert weekend == pytest.approx(0.5, abs=0.12)


def test_recorded_traces_are_held_against_the_milder_service() -> None:
    for trace in (sample_trace(), sample_trace().first(0)):
        facts = info(trace)
        assert facts["bursts"]["like"] is None
        assert facts["weekend_load"] is None
        assert {row.of for row in marginals(facts) if row.label.startswith("load variance")} == {"Azure conversation"}
        assert "published" in info_text(facts)


@pytest.mark.parametrize("trace", [bursty(), sample_trace(), sample_trace().first(0)], ids=("bursty", "tiny", "empty"))
def test_the_drawing_is_a_picture(trace: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_marginals(trace, info(trace), tmp_path / "plots")
    assert path == tmp_path / "plots" / "marginals.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="cannot be a folder"):
        write_marginals(trace, info(trace), tmp_path / "file")


def test_info_draws_where_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_trace(bursty(), tmp_path / "trace.jsonl.gz")
    assert main(["trace", "info", str(tmp_path / "trace.jsonl.gz"), "--report", str(tmp_path / "plots")]) == 0
    output = capsys.readouterr()
    assert "Azure code" in output.out
    assert output.err.strip().endswith("marginals.png")
    assert (tmp_path / "plots" / "marginals.png").is_file()


def test_a_drawing_without_matplotlib_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importing = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["trace", "info", "absent.jsonl", "--report", str(tmp_path)]) == 1
    assert "mtserve[report]" in capsys.readouterr().err
