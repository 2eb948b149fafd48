"""The result of a replay as a table for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtserve.trace.replay.agreement import added_error, allowed_ratio
from mtserve.trace.replay.runs import ReplayResult
from mtserve.units import format_bytes

PHASES = {
    "outside": "outside: admitting, mostly",
    "copies": "copies: index and mover",
    "planning": "planning: choosing, launching",
    "device": "device: waiting for a batch",
    "answers": "answers: publishing, answering",
    "idle": "idle: asleep",
}


def print_result(console: Console, result: ReplayResult, summary: dict[str, Any]) -> None:
    """Print what was run, both runs side by side, the cache's work, where the time went, and the verdict on the scores."""
    console.print()
    for line in _head(result, summary):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_runs(result, summary))
    console.print()
    console.print(_hits(summary))
    console.print()
    console.print(_tiers(summary))
    console.print()
    console.print(_time(summary))
    console.print()
    for line in _verdict(result, summary):
        console.print(line, soft_wrap=True)


def _head(result: ReplayResult, summary: dict[str, Any]) -> list[str]:
    trace, memory, loop = summary["trace"], summary["memory"], summary["loop"]
    kind = " (calibrated-synthetic)" if trace["calibrated-synthetic"] else ""
    mode = f"open loop at {loop['speed']:g}x" if result.open_loop else f"closed loop, {loop['concurrency']} in flight"
    lines = [
        f"[bold]{escape(trace['name'])}[/]{kind}: {summary['requests']:,} requests of {summary['users']:,} users; {mode}",
        f"{escape(summary['model'])}, {summary['dtype']} on {summary['device']} ({summary.get('gpu', summary['processor'])}), "
        f"seed {summary['seed']}, commit {summary['commit']}",
        f"working set {format_bytes(memory['working_set_bytes'])} in pages of {memory['page_tokens']} tokens, "
        f"{format_bytes(memory['page_bytes'])} each",
    ]
    if summary["chaos"]:
        lines.append(f"under chaos: {escape(summary['chaos'])}")
    return lines


def _grid(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", min_width=64)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _capped(summary: dict[str, Any]) -> bool:
    baseline = summary["baseline"]
    return baseline is not None and baseline["of_requests"] < summary["requests"]


def _runs(result: ReplayResult, summary: dict[str, Any]) -> Table:
    baseline = summary["baseline"]
    title = f"without (first {baseline['of_requests']:,})" if _capped(summary) else "without"
    table = _grid("Speed", "", "with cache", title, "ratio")

    def row(name: str, ours: float, theirs: float | None, ratio: float | None, digits: int = 1) -> None:
        known = ratio is not None and theirs is not None
        table.add_row(
            name,
            f"{ours:,.{digits}f}",
            "-" if theirs is None else f"{theirs:,.{digits}f}",
            f"{ratio:.2f}x" if known else "-",
        )

    for quantile in ("p50", "p95", "p99"):
        ours, theirs = summary["latency_ms"][quantile], baseline and baseline["latency_ms"][quantile]
        row(f"latency {quantile}, ms", ours, theirs, theirs / ours if theirs and ours else None)
    ours, theirs = summary["throughput_rps"], baseline and baseline["throughput_rps"]
    row("throughput, requests/s", ours, theirs, ours / theirs if theirs else None)
    ours = summary["batch_tokens"] / max(1, summary["of_requests"])
    theirs = baseline and baseline["batch_tokens"] / max(1, baseline["of_requests"])
    row("tokens computed a request", ours, theirs, theirs / ours if theirs and ours else None)
    ours, theirs = summary["padded_rows_share"], baseline and baseline["padded_rows_share"]
    if ours is not None:
        row("rows computed as padding, %", 100 * ours, None if theirs is None else 100 * theirs, None)
    if result.speedup is not None:
        table.add_section()
        table.add_row(f"speedup ({summary['speedup_of']})", "", "", f"[bold]{result.speedup:.2f}x[/]")
    return table


def _hits(summary: dict[str, Any]) -> Table:
    table = _grid("Where prefixes were found, %", "", "gpu", "host", "hits in all")
    after = summary["hit_ratio_after_first"]
    rows = [
        ("requests, by their slowest tier", summary["hit_ratio"]["request"]),
        ("prefix tokens", summary["hit_ratio"]["token"]),
        ("requests, but each user's first", after["request"]),
        ("prefix tokens, but each user's first", after["token"]),
    ]
    for name, ratios in rows:
        table.add_row(name, *(f"{100 * ratios[tier]:.1f}" for tier in ("gpu", "host", "total")))
    return table


def _tiers(summary: dict[str, Any]) -> Table:
    table = _grid("Memory", "", "gpu", "host")
    memory = summary["memory"]
    tiers = (memory["gpu"], memory["host"])
    table.add_row("capacity", *(format_bytes(tier["capacity_bytes"]) for tier in tiers))
    table.add_row("of the working set", *(f"{100 * tier['share_of_working_set']:.0f}%" for tier in tiers))
    table.add_row("peak", *(f"{format_bytes(tier['peak_bytes'])}, {tier['peak_pages']:,} pages" for tier in tiers))
    table.add_row("pages evicted", *(f"{tier['evicted_pages']:,}" for tier in tiers))
    table.add_row("moved in", format_bytes(memory["load_bytes"]), format_bytes(memory["store_bytes"]))
    if memory["copies_failed"] or summary["chaos"]:
        copies = ((memory[f"{kind}s_failed"], memory[f"{kind}s"]) for kind in ("load", "store"))
        table.add_row("copies in that failed", *(f"{failed:,.0f} of {failed + done:,.0f}" for failed, done in copies))
    return table


def _time(summary: dict[str, Any]) -> Table:
    table = _grid("Where the time went", "", "with cache, s", "%", "without, s", "%")
    baseline = summary["baseline"]
    first = f"; without: the first {baseline['of_requests']:,} requests" if _capped(summary) else ""
    table.caption = f"% of the wall time; what is under way overlaps, itself and the phases above{first}"
    table.caption_justify = "left"
    times = [summary["time"], {} if baseline is None else baseline["time"]]

    def row(name: str, *spent: float | None) -> None:
        cells: list[str] = []
        for seconds, time in zip(spent, times, strict=True):
            cells += ["-", "-"] if seconds is None else [f"{seconds:,.3f}", f"{100 * seconds / time['wall_s']:.1f}"]
        table.add_row(name, *cells)

    for phase, name in PHASES.items():
        row(name, *(time["loop"][phase] if time else None for time in times))
    table.add_section()
    row("wall time", *(time.get("wall_s") for time in times))
    table.add_section()
    for kind, name in (("batches", "batches under way"), ("load", "loads under way"), ("store", "stores under way")):
        row(name, *(time.get(f"{kind}_s") for time in times))
    return table


def _verdict(result: ReplayResult, summary: dict[str, Any]) -> list[str]:
    agreement = result.agreement
    compared, verified = agreement.compared, agreement.verified
    lines = []
    if result.baseline is not None:
        lines.append(
            f"largest difference between cached and uncached over {compared.requests:,} requests: "
            f"score {compared.max_score:.3g}, logit {compared.max_logit:.3g}; relative L2 {compared.relative_l2:.3g}"
        )
    if verified.requests:
        apart = f"cached {verified.cached.relative_l2:.3g}"
        apart += f", uncached {verified.uncached.relative_l2:.3g}" if verified.uncached else ""
        lines.append(
            f"{verified.requests} requests of up to {verified.longest_tokens:,} tokens recomputed in fp32: "
            f"relative L2 from it {apart}"
        )
    elif result.config.verify:
        lines.append(
            f"no request was recomputed in fp32: all {verified.skipped_longer:,} are longer than "
            f"--verify-tokens {result.config.verify_tokens}"
        )
    for run, name in ((summary, "with cache"), (summary["baseline"], "without")):
        if run and run["failures"]:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in run["failures"].items())
            lines.append(f"failed {name}: {kinds}; the first: {escape(run['first_failure'])}")
    lines += [f"[bold red]DISAGREEMENT[/] {escape(line)}" for line in agreement.broken]
    if agreement.holds:
        lines.append(_held(result))
    return lines


def _held(result: ReplayResult) -> str:
    agreement = result.agreement
    if agreement.tolerance is not None and (result.baseline is not None or agreement.verified.requests):
        return f"[bold green]scores agree[/] to {agreement.tolerance:g}"
    if agreement.tolerance is None and agreement.verified.requests and agreement.verified.uncached:
        added, formats = added_error(result.engine.host_format, result.engine.gpu_format)
        beyond, ratio = f" and {added:g} for {formats}" if added else "", allowed_ratio(agreement.verified.requests)
        return f"[bold green]scores agree[/]: no further from fp32 than {ratio:.3g} times the uncached ones{beyond}"
    return "[bold yellow]scores were not compared[/] with anything that this type's rule needs"
