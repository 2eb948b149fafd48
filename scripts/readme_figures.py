"""Print the README's figures from the result files, or write them between its markers with --write.

A result file that is not there is named in place of its figures, and so is the command that makes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from figures.batches import forward_lines, loop_lines, planning_lines, product_lines
from figures.formats import format_lines, gpu_format_lines
from figures.markdown import Lines, Result
from figures.replays import cpu_replay_lines, gpu_replay_lines, soak_lines
from figures.simulations import cells_lines, forecast_lines, replacement_lines, sampling_lines
from figures.tiers import history_lines, restore_lines, transfer_lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- figures: scripts/readme_figures.py -->"
END = "<!-- end of figures -->"

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
