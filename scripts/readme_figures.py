"""Print the README's figures from the result files, or write them between its markers with --write.

A result file that is not there is named in place of its figures, and so is the command that makes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- figures: scripts/readme_figures.py -->"
END = "<!-- end of figures -->"

# Of bench_transfer: who is moved, and where the pages lie.
CASES = (
    ("8 users x 4096 tokens", "as allocated"),
    ("8 users x 4096 tokens", "every page apart"),
    ("512 users, 50, 700 and 4096 tokens", "as allocated"),
)

Result = dict[str, Any]
Lines = list[str]


def hardware(stamp: Result) -> str:
    """What the figures were measured on."""
    return f"{stamp.get('gpu', stamp['processor'])}, commit {stamp['commit']}, seed {stamp['seed']}"


def table(columns: Lines, rows: list[Lines]) -> Lines:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def replay_rows(replays: dict[str, Result]) -> Lines:
    """One row a replay; the padding of the runner where one of them padded."""
    columns = [
        "replay", "found on GPU / host / in all, % of prefix tokens", "p50 latency cached / uncached, ms",
        "requests/s cached / uncached", "speedup", "largest score difference",
    ]  # fmt: skip
    padded = {name: result.get("padded_rows_share") for name, result in replays.items()}
    pads = any(share is not None for share in padded.values())
    rows = []
    for name, result in replays.items():
        token, base = result["hit_ratio"]["token"], result["baseline"]
        row = [
            name,
            " / ".join(f"{100 * token[tier]:.1f}" for tier in ("gpu", "host", "total")),
            f"{result['latency_ms']['p50']:.1f} / {base['latency_ms']['p50']:.1f}",
            f"{result['throughput_rps']:.1f} / {base['throughput_rps']:.1f}",
            f"{result['speedup']:.2f}",
            f"{result['max_score_difference']:.1e}",
        ]
        share = padded[name]
        rows.append([*row, number(None if share is None else 100 * share, 1)] if pads else row)
    return table([*columns, "rows computed as padding, %"] if pads else columns, rows)


def cpu_replay_lines(result: Result) -> Lines:
    first = next(iter(result["replays"].values()))
    intro = f"`{first['model']}`, float32 on the CPU ({hardware(result['stamp'])}):"
    return [intro, "", *replay_rows(result["replays"])]


def gpu_replay_lines(result: Result) -> Lines:
    stamp = hardware(result["stamp"])
    intro = [
        f"`hstu-512`, bfloat16 on the GPU ({stamp}); 'generated' is calibrated-synthetic, 200 users; so are 'returning',",
        "40 users who come back 100 times each, of whom the GPU holds 4 at a time, and 'restoring', 160 users who come back",
        "25 times each, of whom it holds 16; 'load' always loads what the host has, the others when that is expected to be",
        "sooner than encoding it again; x8, x4: how the host keeps it; uncached: the first few hundred requests alone:",
    ]
    note = ["", result["note"]] if "note" in result else []
    return [*intro, "", *replay_rows(result["replays"]), *note, *time_lines(result["replays"])]


def time_lines(replays: dict[str, Result]) -> Lines:
    """Where the time of the replays whose users come back went."""
    phases = ("planning", "device", "copies", "answers", "idle")
    columns = [
        "replay",
        "wall, s",
        *(f"{phase}, %" for phase in phases),
        "batches / loads / stores under way, %",
        "loads, GB/s",
    ]
    rows = []
    for name, result in replays.items():
        spent = result.get("time")
        if not name.startswith(("returning", "restoring")) or spent is None:
            continue
        wall = spent["wall_s"]
        under_way = " / ".join(number(100 * spent[key] / wall, 0) for key in ("batches_s", "load_s", "store_s"))
        shares = [number(100 * spent["loop"][phase] / wall, 0) for phase in phases]
        rows.append([name, number(wall, 2), *shares, under_way, number(spent["load_gb_per_s"], 1)])
    if not rows:
        return []
    return ["", "Where that time went (the loop's thread; what is under way overlaps):", "", *table(columns, rows)]


def forward_lines(result: Result) -> Lines:
    """The layers alone, cached and full, beside the floor and the best public stack where one was measured."""
    columns = ["shape", "ms", "deterministic, ms", "floor, ms", "best public stack, ms"]
    rows = [
        [
            row["case"], number(row["ms"], 3), number(row.get("deterministic_ms"), 3), number(row["floor_ms"], 3),
            number(row["public_ms"], 2),
        ]
        for row in result["results"]
    ]  # fmt: skip
    return [
        f"All layers of one batch, bfloat16, medians ({hardware(result['stamp'])}; B users of L cached tokens, `new`",
        "behaviours and N candidates each; 'full' encodes everything; floor: the larger of FLOP / 600e12 and bytes / 4.2e12):",
        "",
        *table(columns, rows),
    ]


def product_lines(result: Result) -> Lines:
    """The products of one layer with all that is fused into them, beside the library's."""
    columns = ["product", "us", "tile", "TFLOP/s", "floor, us", "torch.addmm, us", "torch.mm alone, us"]
    rows = []
    for row in result["rows"]:
        floor, library, bare = row["floor_ms"], row["ms"].get("torch.addmm"), row["ms"]["torch.mm alone"]
        times = [number(None if each is None else 1e3 * each, 1) for each in (row["ms"]["ours"], floor, library, bare)]
        rows.append([row["shape"], times[0], row["tile"], number(row["tflops"], 0), *times[1:]])
    return [
        f"One product, bfloat16, medians ({hardware(result)}; T rows; 'projection': d to 4 d with bias, SiLU and page",
        "write, where torch.mm alone does none of these; 'output': d to d, added to the residual):",
        "",
        *table(columns, rows),
    ]


def loop_lines(result: Result) -> Lines:
    """What lies beside the GPU: the loop by hand with a full queue, and with client threads in its process."""
    columns = [
        "driven by", "GPU a batch, ms", "CPU to plan and launch it, ms", "GPU waits between batches, ms",
        "GPU idle, %", "requests/s", "latency p50 / p99, ms",
    ]  # fmt: skip
    threads = {view: f"{result[view]['threads']} client threads" for view in ("clients", "few") if view in result}
    names, rows = {"steps": "hand, its queue full", **threads}, []
    for view, name in names.items():
        found = result[view]
        quantiles = [number(found.get(f"latency_{quantile}_ms"), 1) for quantile in ("p50", "p99")]
        times = [number(found[key], 3) for key in ("gpu_ms", "launch_cpu_ms", "gap_ms")]
        idle, rate = number(100 * found["gpu_idle_share"], 1), number(found["requests_per_s"], 0)
        rows.append([name, *times, idle, rate, " / ".join(quantiles)])
    return [
        f"The engine's loop, `{result['model']}` in bfloat16, warm users of {result['history']:,} tokens, {result['new']} new behaviours and",
        f"{result['candidates']} candidates a request, at most {result['batch']} requests a batch, medians ({hardware(result['stamp'])}):",
        "",
        *table(columns, rows),
    ]


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


def soak_lines(result: Result) -> Lines:
    totals = result["totals"]
    return [
        f"Replays under chaos for {result['minutes']:.0f} minutes: {result['rounds']:,} rounds, {totals['checked']:,} scores of",
        f"requests held against a full recompute, {result['broken']} rules broken, nothing left in flight;",
        f"{totals['loads_failed_total']:,.0f} loads and {totals['stores_failed_total']:,.0f} write-backs failed on purpose"
        f" ({hardware(result['stamp'])}).",
    ]


def cells_lines(result: Result) -> Lines:
    """What one generated trace would find, and the memory that targets take."""
    cells, sizing = result["cells"], result["sizing"]
    policies = list(dict.fromkeys(cell["policy"] for cell in cells))
    sizes: dict[tuple[str, str], dict[str, Result]] = {}
    for cell in cells:
        sizes.setdefault((cell["gpu_cache"], cell["host_cache"]), {})[cell["policy"]] = cell
    columns = [
        "GPU / host, % of the working set",
        *(f"{policy}, %" for policy in policies),
        "optimum, %",
        "requests/s (lru)",
    ]
    rows = []
    for (gpu, host), found in sizes.items():
        ratios = [number(100 * found[policy]["hit_ratio"]["token"]["total"], 1) for policy in policies]
        best = number(100 * found["lru"]["optimum_token_hit_ratio"], 1)
        rows.append([f"{gpu} / {host}", *ratios, best, number(found["lru"]["predicted"]["requests_per_s"], 0)])
    first = cells[0]
    targets = list(sizing["curves"][0]["bytes_for_after_first"])
    memory = [
        [
            curve["policy"],
            *("-" if size is None else f"{size / 2**30:.0f}" for size in curve["bytes_for_after_first"].values()),
        ]
        for curve in sizing["curves"]
    ]
    return [
        f"`mtserve simulate` of a generated trace (calibrated-synthetic; {result['users']:,} users, {first['requests']:,} requests),",
        f"`{first['model']}`, working set {first['working_set_bytes'] / 2**30:,.0f} GiB: prefix tokens found in both tiers, and what an "
        f"{first['machine']} is predicted",
        f"to answer (commit {result['commit']}, seed {result['seed']}):",
        "",
        *table(columns, rows),
        "",
        "GiB of one tier for a token hit ratio after each user's first request, from "
        f"{sizing['sampled_users']:,} sampled users (LRU's curve is off by {100 * sizing['lru_mean_absolute_error']:.2f} points in the mean):",
        "",
        *table(["policy", *(f"{100 * float(target):g}%" for target in targets)], memory),
        "",
        *operating_lines(result["operating_point"]),
    ]


def operating_lines(point: Result) -> Lines:
    """Both tiers at the size of a published service."""
    columns = ["requests", "found on GPU / host / in all, %", "after first requests, %", "tokens of first requests, %"]
    rows = [
        [
            f"{row['requests']:,}", " / ".join(number(100 * row["token"][tier], 2) for tier in ("gpu", "host", "total")),
            number(100 * row["token_after_first"]["total"], 2), number(100 * row["first_share"], 2),
        ]
        for row in point["rows"]
    ]  # fmt: skip
    return [
        f"Two tiers as MTServe was measured with (it found 98.5%): GPU {point['gpu_share']:.0%}, host {point['host_share']:.0%} of the working set, {point['policy']},",
        f"`{point['model']}`; calibrated-synthetic, {point['users']:,} users of the generator's own parameters, {point['days']} days; the last row has",
        "as many requests a user and day as were published. A user's first request finds nothing; what is missing after it are new behaviours:",
        "",
        *table(columns, rows),
    ]


def forecast_lines(result: Result) -> Lines:
    """What is foretold of replays, beside what a GPU measured."""
    batches = list(next(iter(result["replays"].values()))["off"])
    columns = [
        "replay", "found on GPU / host, %: foretold", "measured", "requests/s measured", "at its median's pace",
        *(f"foretold, batches of {batch}" for batch in batches), "batches of 4 that find what was measured",
        "p50, ms: measured", "foretold, alone",
    ]  # fmt: skip
    rows = []
    for name, row in result["replays"].items():
        found = [
            " / ".join(number(100 * row["found"][who][tier], 1) for tier in ("gpu", "host")) for who in row["found"]
        ]
        rates, p50 = row["requests_per_s"], row["p50_ms"]
        told = [f"{rates['predicted'][batch]:.0f} ({100 * row['off'][batch]:+.0f}%)" for batch in batches]
        paces = [number(rates[key], 0) for key in ("measured", "at_median")]
        told.append(number(rates["given"], 0))
        rows.append([name, *found, *paces, *told, number(p50["measured"], 1), number(p50["predicted"], 1)])
    on = result["measured_on"]
    return [
        f"What `mtserve simulate` foretells of the generated replays above ({on['gpu']}, commit {on['commit']}; forecast of commit",
        f"{result['commit']}; 8 in flight. [docs/simulate.md](docs/simulate.md#forecast) says why it is far above them):",
        "",
        *table(columns, rows),
    ]


def replacement_lines(result: Result) -> Lines:
    """All policies on one tier, the mean over the seeds."""
    cells: dict[tuple[str, float], list[dict[str, float]]] = {}
    for row in result["results"]:
        for cell in row["cells"]:
            cells.setdefault((row["trace"], cell["share"]), []).append(cell["token_hit_percent"])
    names = list(next(iter(cells.values()))[0])
    rows = [
        [f"{trace} {share:.0%}", *(number(sum(each[name] for each in ratios) / len(ratios), 2) for name in names)]
        for (trace, share), ratios in cells.items()
    ]
    behind, first = (
        result["summary"]["behind_the_best"],
        next(row for row in result["results"] if row["trace"] == "default"),
    )
    beyond = [
        f"{each['trace']} {each['share']:.0%} ({each['points']:.2f}, {each['best_other']})"
        for each in behind["beyond_target"]
    ]
    return [
        f"Prefix tokens found, %, by one tier of a share of the working set; generated, {first['users']:,} users and {first['requests']:,} requests",
        f"or a few more, `{result['model']}` (EB-NeRD: 19 users, 538 requests; commit {result['stamp']['commit']}). `locality` finds more than all others that",
        f"serve in {behind['cells_ahead_of_all_others']} of {behind['cells']} cells, and more than {behind['target_points']} points less than the best of them in: {', '.join(beyond) or 'none'}.",
        "",
        *table(["trace, tier", *names], rows),
    ]


def sampling_lines(result: Result) -> Lines:
    """How far off a sample's miss-ratio curve is."""
    columns = ["users, requests, model, share sampled", "ours: mean / largest, points", "SHARDS-adj", "uncorrected"]
    rows = [
        [
            f"{row['users']:,}, {row['requests']:,}, {row['model']}, {row['rate']:g}",
            *(
                f"{row[f'{way}_mean_points']:.2f} / {row[f'{way}_largest_points']:.2f}"
                for way in ("ours", "adjusted", "plain")
            ),
        ]
        for row in result["results"]
    ]
    return [
        f"LRU's miss-ratio curve from some of the users: |sampled - exact| of the token hit ratio over {result['points']} sizes,",
        f"{result['seeds']} samples (commit {result['commit']}, seed {result['seed']}):",
        "",
        *table(columns, rows),
    ]


def planning_lines(result: Result) -> Lines:
    return [
        f"Planning a batch of {result['batch_users']} users (lookup, page allocation, policy, publication) beside",
        f"{result['other_users']:,} cached users: {result['batch_median_us']:.0f} us median ({hardware(result)}).",
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


SECTIONS: tuple[tuple[str, str, Callable[[Result], Lines]], ...] = (
    ("replay_ebnerd_cpu.json", "make bench", cpu_replay_lines),
    ("gpu_check.json", "make gpu-check", gpu_replay_lines),
    ("forward.json", "make gpu-check", forward_lines),
    ("product.json", "make gpu-check", product_lines),
    ("loop.json", "make gpu-check", loop_lines),
    ("transfer.json", "make gpu-check", transfer_lines),
    ("restore.json", "make gpu-check", restore_lines),
    ("soak_cpu.json", "python benchmarks/soak.py", soak_lines),
    ("soak_cuda.json", "python benchmarks/soak.py --device cuda", soak_lines),
    ("soak_cuda_2.json", "python benchmarks/soak.py --device cuda", soak_lines),
    ("formats.json", "python benchmarks/bench_formats.py", format_lines),
    ("gpu_format.json", "python benchmarks/bench_gpu_format.py", gpu_format_lines),
    ("cells.json", "python benchmarks/bench_cells.py", cells_lines),
    ("forecast.json", "python benchmarks/bench_forecast.py", forecast_lines),
    ("replacement.json", "python benchmarks/bench_replacement.py", replacement_lines),
    ("sampling.json", "python benchmarks/bench_sampling.py", sampling_lines),
    ("planning.json", "make bench", planning_lines),
    ("history.json", "make bench", history_lines),
)


def section(name: str, command: str, lines: Callable[[Result], Lines]) -> Lines:
    """The figures of one result file, or how to come by them."""
    path = RESULTS / name
    if not path.is_file():
        return [f"`benchmarks/results/{name}` is not there yet: `{command}` writes it."]
    return lines(json.loads(path.read_text()))


def figures() -> str:
    """The figures section, Markdown."""
    lines = [
        "## Figures",
        "",
        "Replays of the EB-NeRD trace (538 requests, 19 users) in a closed loop of 8 requests, GPU tier at a share of",
        "the final working set, host tier at all of it; 'uncached' encodes every history whole with the same kernels.",
        "A GPU tier of a few pages lets few users into a batch: there the cache can lose, and does.",
    ]
    for each in SECTIONS:
        lines += ["", *section(*each)]
    return "\n".join(lines)


def main() -> int:
    text = figures()
    if "--write" not in sys.argv[1:]:
        print(text)
        return 0
    readme = ROOT / "README.md"
    content = readme.read_text()
    before, _, rest = content.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
