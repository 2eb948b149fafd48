"""What simulations tell: cells, memory for targets, forecasts, samples and policies."""

from __future__ import annotations

from figures.markdown import Lines, Result, number, table


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
        f"{result['commit']}; 8 in flight. [docs/simulate.md](docs/simulate.md#forecast) says why it is above them):",
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
