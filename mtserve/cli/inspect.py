"""`mtserve inspect`: what a model, a history folder or a trace is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtserve.cli.flags import make_parser
from mtserve.errors import CorruptState, FailedPrecondition, InvalidArgument, NotFound
from mtserve.units import format_bytes

if TYPE_CHECKING:
    import argparse

    from mtserve.history.sqlite import SqliteStorage
    from mtserve.model.schema import FeatureSchema

DESCRIPTION = """\
Look into a model (a preset or a .safetensors file), a folder of histories, or a trace file. Without a name:
the presets.
"""
EPILOG = """\
examples:
  mtserve inspect                                  the presets
  mtserve inspect mtgr-large --behaviours 800      what a user of 800 behaviours takes in memory
  mtserve inspect model.safetensors --json
  mtserve inspect mtserve-history                  users, behaviours, and a check of everything stored
  mtserve inspect trace.jsonl.gz
"""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}
DATABASE = "history.sqlite"
USERS_AT_ONCE = 1024


def run(words: list[str]) -> int:
    """Parse `words`, find out what their target is, and print its facts."""
    args = _parser().parse_args(words)
    facts = _facts(args)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    _print(facts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("inspect", DESCRIPTION, EPILOG, "[PRESET|FILE|DIR]")
    parser.add_argument("target", metavar="PRESET|FILE|DIR", nargs="?", help="what to look into")
    parser.add_argument(
        "--behaviours",
        type=int,
        metavar="N",
        help="models: length of a typical history (default: the model's max_history)",
    )
    parser.add_argument(
        "--page-tokens", type=int, metavar="N", default=64, help="models: tokens of a page (default 64)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    from mtserve.trace.io import SUFFIXES

    if args.target is None:
        return _presets()
    path = Path(args.target)
    if path.is_dir():
        return _history(path)
    if args.target.endswith(SUFFIXES):
        from mtserve.trace.info import info
        from mtserve.trace.io import read_trace

        return info(read_trace(path))
    return _model(args.target, args.behaviours, args.page_tokens)


def _presets() -> dict[str, Any]:
    from mtserve.model.presets import PRESETS

    return {
        name: f"{config.layers} layers of {config.d}, {config.heads} heads of {config.head_dim}, "
        f"up to {config.max_history:,} behaviours"
        for name, config in PRESETS.items()
    }


def _model(source: str, behaviours: int | None, page_tokens: int) -> dict[str, Any]:
    from dataclasses import asdict

    from mtserve.cli.models import load_model
    from mtserve.model.weights import fingerprint

    model = load_model({"source": source})
    config, schema = model.config, model.schema
    if behaviours is None:
        behaviours = config.max_history
    for field, value, high in (("behaviours", behaviours, config.max_history), ("page_tokens", page_tokens, 1024)):
        if not 1 <= value <= high:
            raise InvalidArgument(f"{value} is outside 1 to {high}", field=field)
    pages = -(-(len(schema.user) + behaviours) // page_tokens)
    facts: dict[str, Any] = {
        "config": asdict(config),
        "features": {group: [f.name for f in getattr(schema, group)] for group in ("user", "behaviour", "candidate")},
        "fingerprint": fingerprint(model),
        "parameters": {
            "embeddings": sum(p.numel() for name, p in model.named_parameters() if name.startswith("tables.")),
            "others": sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tables.")),
        },
        "typical_behaviours": behaviours,
        "pages_per_user": pages,
        "states": {},
    }
    for dtype, size in DTYPE_BYTES.items():
        user_bytes = pages * page_tokens * config.state_values_per_token * size
        facts["states"][dtype] = {
            "bytes_per_token": config.state_values_per_token * size,
            "bytes_per_user": user_bytes,
            "users_per_gib": round(2**30 / user_bytes, 1),
        }
    return facts


def _history(folder: Path) -> dict[str, Any]:
    """Count and check. The folder is opened as a server would, so it must not be in use."""
    if not (folder / DATABASE).is_file():
        raise NotFound(f"{folder} holds no histories: there is no {DATABASE} in it", field="target")
    from mtserve.history.embedded import EmbeddedHistory
    from mtserve.history.sqlite import SqliteStorage

    storage = SqliteStorage(folder)
    try:
        known = storage.claim({})
        schema = _stored_schema(known)
    except BaseException:
        storage.close()
        raise
    with EmbeddedHistory(schema, storage) as history:
        users, kept, ever = _count(storage)
        history.check()
    return {
        "users": users,
        "behaviours_kept": kept,
        "behaviours_ever": ever,
        "file_bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "features": {group: [f.name for f in getattr(schema, group)] for group in ("user", "behaviour")},
        "check": "ok",
    }


def _stored_schema(known: dict[str, str]) -> FeatureSchema:
    """A schema with the rows that the folder records; tables and roles are not recorded, and not needed to read it."""
    from mtserve.model.schema import Feature, FeatureSchema

    if "rows" not in known:
        raise FailedPrecondition("the folder records no rows", field="target")
    try:
        groups = json.loads(known["rows"])
        user, behaviour = (
            tuple(_feature(*entry) for entry in groups[name] if entry[0] not in ("time_ms", ""))
            for name in ("user", "behaviour")
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptState(f"the folder's record of its rows is broken: {error!r}", field="target") from None
    return FeatureSchema(user, behaviour, (Feature("item", buckets=1, dim=1),))


def _feature(name: str, kind: str, shape: list[int] | None = None) -> Any:
    from mtserve.model.schema import Feature

    if shape is None:
        return Feature(name, buckets=1, dim=1)
    return Feature(name, kind="dense", width=shape[0])


def _count(storage: SqliteStorage) -> tuple[int, int, int]:
    """(users, behaviours kept, behaviours ever appended)."""
    users, kept, ever, name = 0, 0, 0, b""
    while True:
        with storage.reading() as reader:
            found = reader.users_after(name, USERS_AT_ONCE)
        users += len(found)
        kept += sum(record.span.position - record.span.first for _, record in found)
        ever += sum(record.span.position for _, record in found)
        if len(found) < USERS_AT_ONCE:
            return users, kept, ever
        name = found[-1][0]


def _print(facts: dict[str, Any], indent: str = "") -> None:
    """Nested facts as indented lines; a trace as its own table."""
    if "prefix_tokens" in facts:
        from mtserve.trace.info import info_text

        print(info_text(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print(value, indent + "  ")
        else:
            print(f"{indent}{name}: {_plain(name, value)}")


def _plain(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        if name.endswith("bytes") or "bytes_per" in name:
            return f"{value:,} ({format_bytes(value)})"
        return f"{value:,}"
    return str(value)
