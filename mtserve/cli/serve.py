"""`mtserve serve`: the gRPC server."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from mtserve.cli.flags import add_config_file, add_fields, make_parser, tables_of
from mtserve.cli.models import add_model, load_model
from mtserve.config import EngineConfig, HistoryConfig, ServerConfig
from mtserve.units import format_bytes

if TYPE_CHECKING:
    import argparse

    from mtserve.engine.engine import Engine

DESCRIPTION = """\
Open the history store, take the memory of both tiers, and serve gRPC until SIGTERM or Ctrl-C, which drain.
"""
EPILOG = """\
examples:
  try it out: a seeded model, histories lost at exit
    mtserve serve --model tiny --history-kind memory

  a model of your own, 40 GiB of states on the GPU and 200 GiB behind
    mtserve serve --model model.safetensors --gpu-cache 40GiB --host-cache 200GiB --host 0.0.0.0

  from a file; flags win over it
    mtserve serve --config mtserve.toml --port 50052

  how clients fare when one copy in twenty fails and one in fifty takes 20 ms longer; the scores stay right
    mtserve serve --model tiny --history-kind memory --chaos fail=0.05,slow=0.02:20ms

mtserve.toml:
  [model]                        [engine]                  [server]             [history]
  source = "model.safetensors"   gpu_cache = "40GiB"       host = "0.0.0.0"     path = "/srv/histories"
                                 host_cache = "200GiB"     port = 50051
  (a preset as `source` also takes `seed` and fields of its configuration, such as `layers`)
"""


def run(words: list[str]) -> int:
    """Parse `words` and serve until a signal."""
    args = _parser().parse_args(words)
    tables = tables_of(args)
    engine_config = EngineConfig.from_table(tables["engine"])
    server_config = ServerConfig.from_table(tables["server"])
    history_config = HistoryConfig.from_table(tables["history"])

    from mtserve.engine.engine import Engine
    from mtserve.history.open import open_history
    from mtserve.server.lifecycle import run as serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    model = load_model(tables["model"])
    history = open_history(history_config, model.schema)
    try:
        print(_history_line(history_config, history.count()), flush=True)
        engine = Engine(model, engine_config, history=history)
    except BaseException:
        history.close()
        raise
    for line in _engine_lines(engine):
        print(line, flush=True)
    gc.collect()
    gc.freeze()  # what the start left on the heap lives as long as the process: requests do not wait while it is searched
    serve(engine, server_config, history=history, max_append=history_config.max_append)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("serve", DESCRIPTION, EPILOG)
    add_model(parser, seed=True)
    add_config_file(parser)
    add_fields(parser, EngineConfig, "engine")
    add_fields(parser, ServerConfig, "server")
    add_fields(parser, HistoryConfig, "history", prefix="history-")
    return parser


def _history_line(config: HistoryConfig, users: int) -> str:
    where = "in memory, lost at exit" if config.kind == "memory" else f"in {config.path}"
    return f"histories: {users:,} users, {where}"


def _engine_lines(engine: Engine) -> list[str]:
    """What the engine has taken."""
    stats, config = engine.stats(), engine.model.config
    lines = [
        f"model: {config.name}, {stats['dtype']} on {stats['device']}, fingerprint {stats['model']['fingerprint'][:16]}"
    ]
    per_user = -(-(len(engine.schema.user) + config.max_history) // stats["page_tokens"])
    for name, tier in stats["tiers"].items():
        pages = tier["pages"]["total"]
        lines.append(
            f"{name} tier: {format_bytes(tier['capacity_bytes'])}, {pages:,} pages of {stats['page_tokens']} tokens: "
            f"{pages // per_user:,} users of {config.max_history:,} behaviours"
        )
    if engine.config.chaos:
        lines.append(f"chaos: {engine.config.chaos}: copies between the tiers fail or come late on purpose")
    return lines
