"""What the formats of the host and the device cost in accuracy and time."""

from __future__ import annotations

from figures.markdown import Lines, Result, hardware, number, table


def format_lines(result: Result) -> Lines:
    """What each format of the host and the device costs in accuracy."""
    columns = [
        "format",
        "bytes a token and layer",
        "relative L2 of the logits",
        "Kendall tau, mean / least",
        "AUC change",
        "relative L2 after 50 cycles",
    ]
    rows = [
        [
            each["name"], number(each["layer_bytes"], 0), f"{each['relative_l2']:.1e}",
            f"{each['kendall_tau']:.4f} / {each['min_kendall_tau']:.4f}", f"{each['auc_change']:+.0e}",
            f"{each['relative_l2_after_cycles']['50']:.1e}",
        ]
        for each in result["results"]
    ]  # fmt: skip
    model = result["model"]
    return [
        "Prefixes restored from what the host may keep, and, `gpu fp8`, whole passes through fp8 pages of the device: in fp32,",
        f"a model of {model['layers']} layers of width",
        f"{model['d']}, trained on a generated trace; {result['requests']} requests, {result['candidates']:,} candidates ({hardware(result['stamp'])}):",
        "",
        *table(columns, rows),
    ]


def gpu_format_lines(result: Result) -> Lines:
    """Pages of fp8 beside pages of bf16."""
    columns = ["", "bf16 pages, ms", "fp8 pages, ms", "relative L2, bf16", "fp8", "users a GiB, bf16", "fp8"]
    rows = [
        [
            f"{kind} {row['case']}", *(number(row[pages]["ms"], 4) for pages in ("native", "fp8")),
            *(f"{row[pages][error]:.1e}" for pages in ("native", "fp8")),
            *(number(row[pages].get("users_per_gib"), 1) for pages in ("native", "fp8")),
        ]
        for kind, error in (("attention", "relative_l2"), ("layers", "error"))
        for row in result[kind]
    ]  # fmt: skip
    return [
        f"The device's pages in fp8 ({hardware(result['stamp'])}; the attention of one layer, whose error is that over the numbers",
        "its pages hold, and all layers, whose error is from an fp32 pass that rounds nothing):",
        "",
        *table(columns, rows),
    ]
