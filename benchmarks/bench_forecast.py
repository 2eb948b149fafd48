"""What `mtserve simulate` foretells of replays that a GPU has answered: prediction beside measurement. Needs no GPU.

    python benchmarks/bench_forecast.py

Measured are the replays of generated traces in gpu_check.json, by a closed loop with 8 requests in flight; the stamp
there says on what machine. Foretold are the same traces, tiers, formats and ways of restoring, once for batches of 4
requests: half of those in flight, as an engine plans one batch while the device has the other; and once for batches of
all 8. Nothing is fitted to these replays: the rates are those of mtserve/restore/gpus.py. `at_median`: the requests a
second of a replay all of which went at the pace of its median request, those in flight over the median latency. `given`:
what is foretold, for batches of 4, of requests that find as much in each tier as the replay's did, by drawing which find
it: what is left of the difference is not the hit ratio's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import RESULTS, make_parser, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from mtserve import provenance  # noqa: E402
from mtserve.cli.console import Phases  # noqa: E402
from mtserve.config import EngineConfig  # noqa: E402
from mtserve.model.presets import default_schema, preset  # noqa: E402
from mtserve.restore.gpus import gpu_figures  # noqa: E402
from mtserve.trace.generator.config import GeneratorConfig  # noqa: E402
from mtserve.trace.generator.synthesis import generate  # noqa: E402
from mtserve.trace.schema import Trace  # noqa: E402
from mtserve.trace.simulate.config import SimulateConfig  # noqa: E402
from mtserve.trace.simulate.demand import demand_of  # noqa: E402
from mtserve.trace.simulate.forecast import Asked, forecast  # noqa: E402
from mtserve.trace.simulate.machine import Machine  # noqa: E402
from mtserve.trace.simulate.study import study  # noqa: E402
from mtserve.trace.simulate.summary import summarise_cells  # noqa: E402

MODEL, SEED = "hstu-512", 0
IN_FLIGHT = 8
BATCHES = (IN_FLIGHT // 2, IN_FLIGHT)
FAR_OFF = 0.25  # of the measured requests/s


@dataclass(frozen=True)
class Replay:
    """How gpu_check.py ran one replay; what is not named here is the engine's own."""

    gpu_cache: str
    host_cache: str = "100%"
    restore: str = "auto"
    host_format: str = "kv"

    def engine(self, batch: int) -> EngineConfig:
        return EngineConfig(max_batch_requests=batch, restore=self.restore, host_format=self.host_format)


REPLAYS = {
    "generated 25%ws": Replay("25%"),
    "restoring 10%ws": Replay("10%"),
    "restoring 10%ws load": Replay("10%", restore="load"),
    "restoring 10%ws x8": Replay("10%", host_format="x8"),
    "restoring 10%ws x8 load": Replay("10%", restore="load", host_format="x8"),
    "restoring 10%ws x4": Replay("10%", host_format="x4"),
    "returning 10%ws load": Replay("10%", restore="load"),
    "returning 10%ws, host 100%ws": Replay("10%"),
    "returning 10%ws, no host": Replay("10%", host_cache="0"),
}


def trace_config(measured: dict[str, Any]) -> GeneratorConfig:
    """Of the trace that a replay has answered."""
    made = measured["trace"]["config"]
    return GeneratorConfig(users=made["users"], requests=made["requests"], seed=made["seed"])


def foretell(replay: Replay, trace: Trace, batch: int) -> dict[str, Any]:
    """The one cell of `mtserve simulate` for batches of up to `batch` requests."""
    config = SimulateConfig(
        policy="lru", gpu_cache=replay.gpu_cache, host_cache=replay.host_cache, curves=False, jobs=1
    )
    (cell,) = summarise_cells(study(trace, preset(MODEL), len(default_schema().user), replay.engine(batch), config))
    return cell


def given_found(replay: Replay, trace: Trace, token: dict[str, float]) -> float:
    """Requests a second when shares `token` of the requests find all that they had before in the GPU tier, or the host's."""
    model, engine = preset(MODEL), replay.engine(BATCHES[0])
    demand = demand_of(trace, model, len(default_schema().user))
    machine = Machine.of(model, engine, torch.bfloat16, gpu_figures("h200"))
    drawn = np.random.default_rng(SEED).random(demand.requests)
    on_gpu = drawn < token["gpu"]
    on_host = ~on_gpu & (drawn < token["gpu"] + token["host"])
    known = np.maximum(demand.tokens - round(GeneratorConfig.clicks_mean), 0)
    gpu_pages = int(demand.working_set_pages(engine.page_tokens) * float(replay.gpu_cache.rstrip("%")) / 100)
    found = ((on * known).astype(np.int32) for on in (on_gpu, on_host))
    return forecast(machine, Asked.of(demand, engine), gpu_pages, *found).requests_per_s


def compared(replay: Replay, trace: Trace, measured: dict[str, Any]) -> dict[str, Any]:
    """One row: what was found, answered a second and waited for, foretold and measured."""
    cells = {batch: foretell(replay, trace, batch) for batch in BATCHES}
    cell, rate = cells[BATCHES[0]], measured["throughput_rps"]
    rates = {batch: each["predicted"]["requests_per_s"] for batch, each in cells.items()}
    p50_ms = measured["latency_ms"]["p50"]
    return {
        "room_for_users": cell["gpu_users"],
        "found": {
            name: {tier: each["hit_ratio"]["token"][tier] for tier in ("gpu", "host")}
            for name, each in (("predicted", cell), ("measured", measured))
        },
        "requests_per_s": {
            "measured": rate,
            "at_median": IN_FLIGHT / p50_ms * 1e3,
            "predicted": rates,
            "given": given_found(replay, trace, measured["hit_ratio"]["token"]),
        },
        "off": {batch: each / rate - 1 for batch, each in rates.items()},
        "p50_ms": {"measured": p50_ms, "predicted": cell["predicted"]["p50_ms"]},
    }


def row_text(name: str, row: dict[str, Any]) -> str:
    rates, off, found = row["requests_per_s"], row["off"], row["found"]
    ways = " ".join(f"{rates['predicted'][batch]:>7.0f} {100 * off[batch]:>+5.0f}%" for batch in BATCHES)
    shares = " ".join(f"{100 * found[who]['gpu']:>6.1f}/{100 * found[who]['host']:<5.1f}" for who in found)
    p50 = row["p50_ms"]
    both = f"{rates['measured']:>9.0f} {rates['at_median']:>9.0f}"
    return (
        f"{name:<30} {both} {ways} {rates['given']:>6.0f}   {p50['measured']:>5.1f} {p50['predicted']:>5.1f}   {shares}"
    )


def main() -> None:
    parser = make_parser(__doc__, "forecast.json")
    parser.add_argument("--measured", type=Path, default=RESULTS / "gpu_check.json")
    args = parser.parse_args()
    measured = json.loads(args.measured.read_text())
    missing = REPLAYS.keys() - measured["replays"].keys()
    if missing:
        sys.exit(f"{args.measured} lacks {', '.join(sorted(missing))}")
    traces, rows = {}, {}
    with Phases() as phases:
        for done, (name, replay) in enumerate(REPLAYS.items(), 1):
            config = trace_config(measured["replays"][name])
            if config not in traces:
                traces[config] = generate(config)
            rows[name] = compared(replay, traces[config], measured["replays"][name])
            phases("replays foretold", done, len(REPLAYS))
    heads = " ".join(f"{f'batches of {batch}':>13}" for batch in BATCHES)
    print(f"{'requests/s':<30} {'measured':>9} {'at median':>9} {heads}  given   p50, alone   found foretold, measured")
    print("\n".join(row_text(name, row) for name, row in rows.items()))
    far = [name for name, row in rows.items() if abs(row["off"][BATCHES[0]]) > FAR_OFF]
    print(f"off by more than {FAR_OFF:.0%}: {', '.join(far) or 'none'}")
    report = {
        "benchmark": "forecast",
        "model": MODEL,
        "measured_on": {key: measured["stamp"][key] for key in ("gpu", "processor", "commit")},
        "far_off": far,
        "replays": rows,
        **provenance.stamp(seed=SEED),
    }
    write_report(report, args.out)


if __name__ == "__main__":
    main()
