"""`mtserve trace`: make, import and look into traces."""

from __future__ import annotations

import argparse
import json
import sys

from mtserve.cli.console import Phases
from mtserve.cli.flags import add_fields, build, check_writable, make_parser
from mtserve.cli.generator_flags import add_generator, generator_config
from mtserve.config import read_toml
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.importers import IMPORTERS, import_trace
from mtserve.trace.importers.config import ImportConfig
from mtserve.trace.info import info, info_text
from mtserve.trace.io import SUFFIXES, read_trace, trace_format, write_trace
from mtserve.trace.schema import Trace

EPILOG = """\
examples:
  mtserve trace generate --users 200 --requests 2000 --out demo.jsonl.gz
  mtserve trace import kuairand log_standard_*.csv --out kuairand.parquet
  mtserve trace info demo.jsonl.gz

`mtserve trace VERB --help` explains each one.
"""
GENERATE = """\
examples:
  mtserve trace generate --users 200 --requests 2000 --out demo.jsonl.gz
  long histories, as many candidates as a retrieval stage sends:
    mtserve trace generate --history-median 8000 --candidates-mean 512 --candidates-spread fixed --out long.parquet
  a hard week: bursts like those of a chat service, three flash crowds, quiet weekends, a fifth of the users new:
    mtserve trace generate --days 14 --bursts-like conversation --bursts-moves requests --crowd-events 3 \\
      --weekend 0.6 --newcomer-share 0.2 --launch-items 20 --out hard.parquet
  groups with habits of their own; a name alone is one of heavy, casual, night:
    mtserve trace generate --groups 'heavy casual:share=0.6 early:share=0.05,later=20' --out groups.parquet
  the same from a file with the tables [generator], [generator.crowds], [generator.groups.early], ...:
    mtserve trace generate --config week.toml --out week.parquet

A group has the fields share (of the users) and later (hours by which its day is later), and as multiples
activity, history, gap (inside sessions) and taste.
The same flags give the same bytes. What is drawn follows published figures of real logs and is marked
calibrated-synthetic wherever it is shown.
"""
IMPORT = """\
examples:
  mtserve trace import kuairand log_standard_4_08_to_4_21_pure.csv --out kuairand.parquet
  mtserve trace import ebnerd behaviors.parquet history.parquet --out ebnerd.jsonl.gz
  a tenth of the users, the first half of each user's requests turned into history:
    mtserve trace import movielens ratings.csv --user-share 0.1 --history-share 0.5 --out movielens.jsonl.gz
"""
INFO = """\
examples:
  mtserve trace info demo.jsonl.gz
  the same as a drawing (needs the extra [report]):
    mtserve trace info demo.jsonl.gz --report plots/
"""


def run(words: list[str]) -> int:
    """Parse `words` and run the verb they start with."""
    verbs = {"generate": _generate, "import": _import, "info": _info}
    if words and words[0] in verbs:
        return verbs[words[0]](words[1:])
    parser = make_parser("trace", "Make, import and look into traces of requests.", EPILOG, None)
    commands = parser.add_subparsers(metavar="VERB", required=True)
    commands.add_parser("generate", help="draw a seeded trace from published figures of real logs")
    commands.add_parser("import", help="convert the files of a public log")
    commands.add_parser("info", help="counts and distributions of a trace file")
    parser.parse_args(words)
    return 0


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", required=True, help=f"the trace to write: {', '.join(SUFFIXES)}")


def _generate(words: list[str]) -> int:
    parser = make_parser(
        "trace generate", "Draw a seeded trace from published figures of real logs.", GENERATE, "--out FILE"
    )
    _add_out(parser)
    parser.add_argument("--config", metavar="FILE", help="TOML file with the table [generator]; flags win")
    add_generator(parser)
    args = parser.parse_args(words)
    _check_out(args.out)
    config = generator_config(args, read_toml(args.config, ("generator",))["generator"] if args.config else {})
    with Phases() as phases:
        trace = generate(config, lambda done, total: phases("generating requests", done, total))
        _write(trace, args.out, phases)
    return 0


def _import(words: list[str]) -> int:
    kinds = "; ".join(f"{kind}: {files}" for kind, (_, files) in IMPORTERS.items())
    parser = make_parser(
        "trace import", f"Convert the files of a public log. {kinds}.", IMPORT, "KIND PATH... --out FILE"
    )
    parser.add_argument("kind", metavar="KIND", help=", ".join(IMPORTERS))
    parser.add_argument("paths", metavar="PATH", nargs="+", help="the log's files")
    _add_out(parser)
    add_fields(parser, ImportConfig, "import", title="import")
    args = parser.parse_args(words)
    _check_out(args.out)
    config = build(ImportConfig, args, "import")
    with Phases() as phases:
        trace = import_trace(args.kind, args.paths, config, progress=lambda done, total: phases("reading", done, total))
        _write(trace, args.out, phases)
    for change, count in trace.meta.changes.items():
        print(f"changed: {change} {count:,}")
    return 0


def _info(words: list[str]) -> int:
    parser = make_parser("trace info", "Counts and distributions of a trace file.", INFO, "TRACE")
    parser.add_argument("trace", metavar="TRACE", help="the trace file")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--report", metavar="DIR", help="draw them (marginals.png) into this folder")
    args = parser.parse_args(words)
    if args.report:
        # Drawing brings torch along, which no other verb here needs.
        from mtserve.trace.marginals_plot import write_marginals
        from mtserve.trace.pyplot import require_matplotlib

        require_matplotlib()
    with Phases() as phases:
        trace = read_trace(args.trace, progress=lambda done, total: phases("reading the trace", done, total))
    facts = info(trace)
    print(json.dumps(facts, indent=2) if args.json else info_text(facts))
    if args.report:
        print(write_marginals(trace, facts, args.report), file=sys.stderr)
    return 0


def _check_out(path: str) -> None:
    trace_format(path)
    check_writable(path, "out")


def _write(trace: Trace, path: str, phases: Phases) -> None:
    write_trace(trace, path, lambda done, total: phases("writing", done, total))
    print(f"{path}: {trace.requests:,} requests of {trace.users:,} users")
