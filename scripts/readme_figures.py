"""Print the README's figures from the result files, or write them between its markers with --write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- figures: scripts/readme_figures.py -->"
END = "<!-- end of figures -->"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def hardware(stamp: dict[str, Any]) -> str:
    """What the figures were measured on."""
    return f"{stamp.get('gpu', stamp['processor'])}, commit {stamp['commit']}, seed {stamp['seed']}"


def replay_rows(replays: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        "| replay | found on GPU / host / in all, % of prefix tokens | p50 latency cached / uncached, ms | requests/s cached / uncached | speedup | largest score difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in replays.items():
        token, base = result["hit_ratio"]["token"], result["baseline"]
        found = " / ".join(f"{100 * token[tier]:.1f}" for tier in ("gpu", "host", "total"))
        p50 = f"{result['latency_ms']['p50']:.1f} / {base['latency_ms']['p50']:.1f}"
        rate = f"{result['throughput_rps']:.1f} / {base['throughput_rps']:.1f}"
        rows.append(
            f"| {name} | {found} | {p50} | {rate} | {result['speedup']:.2f} | {result['max_score_difference']:.1e} |"
        )
    return rows


def figures() -> str:
    """The figures section, Markdown."""
    cpu, gpu = load("replay_ebnerd_cpu.json"), load("gpu_check.json")
    planning, history = load("planning.json"), load("history.json")
    first = next(iter(cpu["replays"].values()))
    lines = [
        "## Figures",
        "",
        "Replays of the EB-NeRD trace (538 requests, 19 users) in a closed loop of 8 requests, GPU tier at a share of",
        "the final working set, host tier at all of it; 'uncached' encodes every history whole with the same kernels.",
        "A GPU tier of a few pages lets few users into a batch: there the cache can lose, and does.",
        "",
        f"`{first['model']}`, float32 on the CPU ({hardware(cpu['stamp'])}):",
        "",
        *replay_rows(cpu["replays"]),
        "",
        f"`hstu-512`, bfloat16 on the GPU ({hardware(gpu['stamp'])}); 'generated' is calibrated-synthetic, 200 users:",
        "",
        *replay_rows(gpu["replays"]),
        "",
        *forward_lines(load("forward.json")),
        *planning_lines(planning),
        *history_lines(history),
    ]
    return "\n".join(lines)


def forward_lines(result: dict[str, Any]) -> list[str]:
    """The layers alone, cached and full, beside the floor and the best public stack where one was measured."""
    rows = [
        f"All layers of one batch, bfloat16, medians ({hardware(result['stamp'])}; B users of L cached tokens, `new`",
        "behaviours and N candidates each; 'full' encodes everything; floor: the larger of FLOP / 600e12 and bytes / 4.2e12):",
        "",
        "| shape | ms | floor, ms | best public stack, ms |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["results"]:
        public = f"{row['public_ms']:.2f}" if row["public_ms"] else "-"
        rows.append(f"| {row['case']} | {row['ms']:.3f} | {row['floor_ms']:.3f} | {public} |")
    return [*rows, ""]


def planning_lines(result: dict[str, Any]) -> list[str]:
    return [
        f"Planning a batch of {result['batch_users']} users (lookup, page allocation, policy, publication) beside",
        f"{result['other_users']:,} cached users: {result['batch_median_us']:.0f} us median ({hardware(result)}).",
        "",
    ]


def history_lines(result: dict[str, Any]) -> list[str]:
    chosen = next(
        case for case in result["cases"] if all(case[key] == value for key, value in result["chosen"].items())
    )
    return [
        f"History store: 10,000 behaviours read in {chosen['read_10k_median_ms']:.2f} ms,",
        f"{chosen['batched_1_row_behaviours_per_s']:,.0f} behaviours/s appended durably in batches of single rows",
        f"({hardware(result['provenance'])}).",
    ]


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
