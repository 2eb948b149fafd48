"""`mtserve simulate`: what a cache would find, and what memory a target takes, without a GPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mtserve.cli.flags import add_fields, build, check_writable, given, make_parser
from mtserve.cli.models import add_model, model_shape
from mtserve.config import EngineConfig
from mtserve.errors import InvalidArgument

if TYPE_CHECKING:
    import argparse

    from mtserve.cli.console import Phases
    from mtserve.config import ModelConfig
    from mtserve.restore.costs import Costs
    from mtserve.trace.schema import Trace

DEFAULT_MODEL = "hstu-512"
ENGINE_FIELDS = (
    "page_tokens", "gpu_format", "host_format", "dtype", "pin_budget", "max_batch_requests", "max_batch_tokens",
    "cold_batch_tokens", "cold_after",
)  # fmt: skip
DESCRIPTION = """\
Ask, before any memory is bought, what a trace would find in it: the engine's own index runs over the trace
(.jsonl, .jsonl.gz or .parquet) once for every policy and size of the tiers, without states and without a GPU.
Prints hit ratios by tier, bytes moved, throughput and latency by a cost model, Belady's optimum beside them,
and how much memory a target takes.
"""
EPILOG = """\
examples:
  how much memory is enough, and does the policy matter?
    mtserve simulate trace.parquet --model hstu-1024 --policy lru,s3fifo,locality

  sizes of your own: shares of the trace's working set ('5%' or '5%ws') or bytes, with a host tier and without
    mtserve simulate trace.parquet --gpu-cache 20GiB,40GiB,80GiB --host-cache 0,200GiB,100%

  smaller pages on the host: more users fit, and come back sooner
    mtserve simulate trace.parquet --host-format x8 --gpu-cache 10% --host-cache 25%,50%,100%

  states in a byte a value, of twice as many users in the same memory
    mtserve simulate trace.parquet --gpu-format fp8 --gpu-cache 20GiB,40GiB --host-cache 0,200GiB

  what a campaign's users find when they are pinned, and what that costs the others (compare with a run without)
    mtserve simulate trace.parquet --pin campaign-users.txt --pin-budget 0.2 --gpu-cache 10% --host-cache 50%

  no trace yet: one is drawn, with the flags of `mtserve trace generate`
    mtserve simulate --generate --users 5000 --requests 100000 --long-gap-hours 24

  times of your own machine, as its engine has measured them at its last start with this model
    mtserve simulate trace.parquet --model model.safetensors --costs ~/.cache/mtserve/costs.json

  keep it, and draw it (the plots need the extra [report])
    mtserve simulate trace.parquet --policy lru,gdsf --json cells.json --report plots/
"""


def run(words: list[str]) -> int:
    """Parse `words`, simulate, and print what came of it."""
    args = _parser().parse_args(words)
    from mtserve.cli.console import Phases, make_console
    from mtserve.cli.simulate_table import print_study
    from mtserve.trace.pyplot import require_matplotlib
    from mtserve.trace.simulate.config import SimulateConfig
    from mtserve.trace.simulate.pins import read_user_ids
    from mtserve.trace.simulate.report import write_study
    from mtserve.trace.simulate.study import study
    from mtserve.trace.simulate.summary import summarise_cells

    _check_together(args)
    check_writable(args.json, "json")
    config = build(SimulateConfig, args, "simulate")
    engine = build(EngineConfig, args, "engine")
    if args.report:
        require_matplotlib()
    model, user_tokens = model_shape(given(args, "model").get("source", DEFAULT_MODEL))
    costs = _costs(args.costs, model, engine)
    with Phases() as phases:
        pin = read_user_ids(Path(args.pin), partial(phases, "reading pinned users")) if args.pin else []
        trace = _trace(args, phases)
        result = study(trace, model, user_tokens, engine, config, costs, phases, pin)
    print_study(make_console(), result)
    if args.json:
        Path(args.json).write_text(json.dumps(summarise_cells(result), indent=2) + "\n", encoding="utf-8")
    if args.report:
        for path in write_study(result, args.report):
            print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    from mtserve.cli.generator_flags import add_generator
    from mtserve.trace.simulate.config import SimulateConfig

    parser = make_parser("simulate", DESCRIPTION, EPILOG, "TRACE|--generate")
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="the trace file")
    parser.add_argument("--generate", action="store_true", help="draw a trace, as the flags of [generator] say")
    add_model(parser, seed=False, default=DEFAULT_MODEL)
    parser.add_argument("--costs", metavar="FILE", help="costs that an engine has measured, in place of those of --gpu")
    parser.add_argument(
        "--pin", metavar="FILE", help="users whose states are kept before others', a user id a line (as Engine.pin)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all cells as JSON")
    parser.add_argument("--report", metavar="DIR", help="write plots (PNG) and the curves (JSON) into this folder")
    add_fields(parser, SimulateConfig, "simulate", title="simulation")
    add_fields(parser, EngineConfig, "engine", only=ENGINE_FIELDS)
    add_generator(parser, title="generator, with --generate")
    return parser


def _check_together(args: argparse.Namespace) -> None:
    from mtserve.cli.generator_flags import given_to_generator

    drawn = given_to_generator(args)
    if args.generate and args.trace:
        raise InvalidArgument(f"takes no trace file, got {args.trace}", field="generate")
    if not args.generate and not args.trace:
        raise InvalidArgument("name a trace file, or give --generate", field="trace")
    if drawn and not args.generate:
        raise InvalidArgument("is for --generate", field=min(drawn))
    if "pin_budget" in given(args, "engine") and not args.pin:
        raise InvalidArgument("is for --pin", field="pin_budget")


def _trace(args: argparse.Namespace, phases: Phases) -> Trace:
    from mtserve.cli.generator_flags import generator_config
    from mtserve.trace.generator.synthesis import generate
    from mtserve.trace.io import read_trace

    if args.generate:
        return generate(generator_config(args, {}), lambda done, total: phases("generating requests", done, total))
    return read_trace(args.trace, progress=lambda done, total: phases("reading the trace", done, total))


def _costs(path: str | None, model: ModelConfig, engine: EngineConfig) -> Costs | None:
    """The newest of the engine's cost file for this shape of model, None without a `path`."""
    if path is None:
        return None
    from mtserve.engine.calibration import states_format
    from mtserve.restore.cache import CostCache

    if not Path(path).is_file():
        raise InvalidArgument(f"{path} is not a file", field="costs")
    shape = (model.layers, model.d, model.heads, model.head_dim)
    wanted = (*shape, engine.page_tokens, states_format(engine), "bfloat16" if engine.dtype == "auto" else engine.dtype)
    found = None
    for key, costs in CostCache(Path(path)).entries().items():
        if (key.layers, key.d, key.heads, key.head_dim, key.page_tokens, key.format, key.dtype) == wanted:
            found = costs
    if found is None:
        raise InvalidArgument(
            f"{path} has no costs for {model.layers} layers of {model.d}, {model.heads} heads of {model.head_dim}, pages of "
            f"{engine.page_tokens} tokens, {wanted[-2]} and {wanted[-1]}",
            field="costs",
        )
    return found
