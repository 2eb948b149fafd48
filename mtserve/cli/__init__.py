"""The command line. Only the command that is asked for is imported, so that `--help` needs no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mtserve import __version__
from mtserve.errors import InvalidArgument, MtserveError, NotFound

COMMANDS = {
    "serve": "run the gRPC server",
    "replay": "drive a trace through the engine, with the cache and without: hit ratio, speedup, memory",
    "simulate": "what a trace would find in tiers of any size, under any policy, and what memory a target takes",
    "trace": "generate a trace, import one from a public log, or look into one",
    "inspect": "what a model, a history folder or a trace is made of",
}
EPILOG = """\
examples:
  mtserve trace generate --users 200 --requests 2000 --out demo.jsonl.gz
  mtserve replay demo.jsonl.gz --gpu-cache 25%ws --host-cache 100%ws
  mtserve simulate demo.jsonl.gz --gpu-cache 5%,10%,25% --policy lru,s3fifo
  mtserve inspect mtgr-small
  mtserve serve --model model.safetensors --config mtserve.toml

`mtserve COMMAND --help` explains each one.
"""
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (it failed), 2 (bad argument) or 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except (InvalidArgument, NotFound) as error:
        return _complain(words, error, USAGE)
    except (MtserveError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        return _complain(words, error, FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:  # argparse, after --help or a usage error
        return error.code if isinstance(error.code, int) else OK


def _run(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        command = import_module(f"mtserve.cli.{words[0]}")
        return int(command.run(words[1:]))
    parser = argparse.ArgumentParser(
        prog="mtserve",
        description="Serve generative ranking models from cached user states.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mtserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what)
    parser.parse_args(words)
    return OK


def _complain(words: list[str], error: Exception, status: int) -> int:
    print(f"mtserve {words[0] if words else ''}: {' '.join(str(error).split())}", file=sys.stderr)
    return status
