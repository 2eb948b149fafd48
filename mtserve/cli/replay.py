"""`mtserve replay`: what the cache is worth on a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mtserve.cli.flags import add_config_file, add_fields, build, check_writable, given, make_parser, tables_of
from mtserve.cli.interpreter import share_often
from mtserve.cli.models import add_model, load_model
from mtserve.config import EngineConfig

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Drive a trace (.jsonl, .jsonl.gz or .parquet) through the engine twice, with the cache and without, on the
same kernels and in the same loop; compare every score, and report hit ratio, latency, throughput and memory.
Exits with 1 when the scores do not agree.
"""
EPILOG = """\
examples:
  how much memory is enough? (a share of the trace's working set: 'N%ws', also for --host-cache)
    mtserve replay trace.jsonl.gz --model mtgr-small --gpu-cache 25%ws --host-cache 100%ws

  latency at ten times the load of the recorded traffic (open loop: queueing counts)
    mtserve replay trace.parquet --model model.safetensors --device cuda --speed 10

  a large trace: the slow run without a cache over its first 2,000 requests only
    mtserve replay trace.parquet --model hstu-1024 --concurrency 64 --baseline-requests 2000

  are the scores right when copies between the tiers fail and come late?
    mtserve replay trace.jsonl.gz --gpu-cache 10%ws --host-cache 100%ws --chaos fail=0.05,slow=0.02:20ms,seed=7

  keep the result, and draw it (the plots need the extra [report])
    mtserve replay trace.jsonl.gz --json result.json --report plots/

The trace gives each behaviour's and candidate's feature `item`, `category` (a hash of the item), `action` and
time; user features are hashes of the user id; other features are 0. Models without `item` cannot be replayed.
"""


def run(words: list[str]) -> int:
    """Parse `words` and replay; 1 when the scores do not agree."""
    args = _parser().parse_args(words)
    from mtserve.cli.console import Phases, make_console
    from mtserve.cli.replay_table import print_result
    from mtserve.trace.io import read_trace
    from mtserve.trace.pyplot import require_matplotlib
    from mtserve.trace.replay.config import ReplayConfig
    from mtserve.trace.replay.report import write_report
    from mtserve.trace.replay.runs import replay
    from mtserve.trace.replay.summary import summarise

    share_often()
    check_writable(args.json, "json")
    if args.report:
        require_matplotlib()
    tables = tables_of(args)
    config = build(ReplayConfig, args, "replay")
    if "replay.seed" not in vars(args) and "seed" in tables["model"]:
        config = ReplayConfig.from_table({**given(args, "replay"), "seed": tables["model"]["seed"]})
    engine = EngineConfig.from_table(tables["engine"])
    with Phases() as phases:
        trace = read_trace(args.trace, progress=lambda done, total: phases("reading the trace", done, total))
        model = load_model({**tables["model"], "seed": config.seed})
        result = replay(trace, model, engine, config, phases)
    summary = summarise(result)
    print_result(make_console(), result, summary)
    if args.json:
        Path(args.json).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if args.report:
        for path in write_report(result, args.report):
            print(path)
    return 0 if result.agreement.holds else 1


def _parser() -> argparse.ArgumentParser:
    from mtserve.trace.replay.config import ReplayConfig

    parser = make_parser("replay", DESCRIPTION, EPILOG, "TRACE")
    parser.add_argument("trace", metavar="TRACE", help="the trace file")
    add_model(parser, seed=False)
    add_config_file(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--report", metavar="DIR", help="write plots (PNG) into this folder")
    add_fields(parser, ReplayConfig, "replay", title="replay")
    add_fields(parser, EngineConfig, "engine")
    return parser
