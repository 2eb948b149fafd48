"""What moves between the tiers, how users come back, and what histories cost to read and append."""

from __future__ import annotations

from figures.markdown import Lines, Result, hardware, number, table

# Of bench_transfer: who is moved, and where the pages lie.
CASES = (
    ("8 users x 4096 tokens", "as allocated"),
    ("8 users x 4096 tokens", "every page apart"),
    ("512 users, 50, 700 and 4096 tokens", "as allocated"),
)


def transfer_lines(result: Result) -> Lines:
    """The movers alone, beside a forward, and what a host hit costs."""
    columns = ["pages moved by", *(f"{label}, pages {layout}: load / store / both" for label, layout in CASES)]
    columns += ["forward beside loads / both ways, x", "warm batch beside loads / both ways, x"]
    rows = []
    for name in ("engine", "one plain copy", "a copy a page", "kernel, 4 blocks", "kernel, 16 blocks"):
        cases = [result["alone"][label][layout][name] for label, layout in CASES]
        rates = [" / ".join(number(case[kind]["gb_per_s"], 1) for kind in ("load", "store", "both")) for case in cases]
        slowed = [
            " / ".join(number(result["beside"][what][name][kind]["slowdown"], 2) for kind in ("load", "both"))
            for what in ("forward", "batch")
        ]
        rows.append([name, *rates, *slowed])
    hit = result["hit"]
    return [
        f"Pages of 1 MiB between pinned host memory and GPU, GB/s, medians ({hardware(result['stamp'])}; both: each way, at once;",
        "beside: how much longer a captured forward, or a whole batch by the engine, takes meanwhile):",
        "",
        *table(columns, rows),
        "",
        f"A batch of 8 users x 4,096 tokens whose states only the host has: {hit['hit_ms']:.2f} ms from the first request to the",
        f"last answer, {hit['ratio']:.2f} times its transfer by itself ({hit['transfer_ms']:.2f} ms).",
    ]


def restore_lines(result: Result) -> Lines:
    """Whole batches of users whose states only the host has, by the way in which these come back."""
    columns = [
        "batch", "encoded again, ms", "loaded, ms", "split, ms", "`auto`, ms", "`auto` loads from layer",
        "`auto` over the best forced", "over encoding again",
    ]  # fmt: skip
    rows = [
        [
            case["name"], *(number(case["ms"][way], 2) for way in ("recompute", "load", "split", "auto")),
            str(case["first_layer"]), number(case["auto_over_best"], 2), number(case["auto_over_recompute"], 2),
        ]
        for case in (*result["table"], *result["grid"])
    ]  # fmt: skip
    cases = len(result["table"]) + len(result["grid"])
    close = sum(case["auto_over_best"] <= 1.05 for case in (*result["table"], *result["grid"]))
    return [
        f"Users whose states only the host has, whole batches from their queue to their answers, medians ({hardware(result['stamp'])};",
        "B users, L tokens on the host, its format; 128 new behaviours and 256 candidates each, `kuairand` 512, `mtgr-large` 64 new):",
        "",
        *table(columns, rows),
        "",
        f"In {close} of {cases} `auto` is within 5% of the best forced way.",
    ]


def history_lines(result: Result) -> Lines:
    chosen = next(
        case for case in result["cases"] if all(case[key] == value for key, value in result["chosen"].items())
    )
    return [
        f"History store: 10,000 behaviours read in {chosen['read_10k_median_ms']:.2f} ms,",
        f"{chosen['batched_1_row_behaviours_per_s']:,.0f} behaviours/s appended durably in batches of single rows",
        f"({hardware(result['provenance'])}).",
    ]
