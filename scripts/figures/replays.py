"""Replays on the CPU and the GPU, and replays under chaos."""

from __future__ import annotations

from figures.markdown import Lines, Result, hardware, number, table


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


def soak_lines(result: Result) -> Lines:
    totals = result["totals"]
    return [
        f"Replays under chaos for {result['minutes']:.0f} minutes: {result['rounds']:,} rounds, {totals['checked']:,} scores of",
        f"requests held against a full recompute, {result['broken']} rules broken, nothing left in flight;",
        f"{totals['loads_failed_total']:,.0f} loads and {totals['stores_failed_total']:,.0f} write-backs failed on purpose"
        f" ({hardware(result['stamp'])}).",
    ]
