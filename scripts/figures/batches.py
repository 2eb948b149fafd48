"""Layers, products and whole batches on a GPU, what lies beside it, and what planning one takes."""

from __future__ import annotations

from figures.markdown import Lines, Result, hardware, number, table


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
    views = ("clients", "few", "clients sooner", "few sooner")
    threads = {
        view: f"{result[view]['threads']} client threads, turns of {result[view]['turns_ms']:g} ms" for view in views
    }
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


def planning_lines(result: Result) -> Lines:
    return [
        f"Planning a batch of {result['batch_users']} users (lookup, page allocation, policy, publication) beside",
        f"{result['other_users']:,} cached users: {result['batch_median_us']:.0f} us median ({hardware(result)}).",
    ]
