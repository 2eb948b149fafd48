"""Command-line flags made from the fields of configuration classes, and configuration made from flags and files."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from mtserve.config import Config, read_toml
from mtserve.errors import InvalidArgument

C = TypeVar("C", bound=Config)
_TYPES = {"int": int, "float": float, "str": str}


def make_parser(command: str, description: str, epilog: str, operands: str | None = "") -> argparse.ArgumentParser:
    """A parser for `mtserve COMMAND`; `operands` stand in the usage, `epilog` teaches by example."""
    return argparse.ArgumentParser(
        prog=f"mtserve {command}",
        usage=f"mtserve {command} {operands} [options]".replace("  ", " ") if operands is not None else None,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_fields(
    parser: argparse.ArgumentParser,
    config: type[Config],
    table: str,
    *,
    prefix: str = "",
    only: Iterable[str] | None = None,
    title: str = "",
) -> None:
    """One flag for each field of `config`: `max_queue` is --max-queue, with `prefix` before it.

    The help states what the field's own checks will hold the value to: unit, range, choices, default.
    """
    group = parser.add_argument_group(title or f"[{table}]")
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        if only is not None and item.name not in only:
            continue
        flag = f"--{prefix}{item.name}".replace("_", "-")
        common: dict[str, Any] = {"dest": f"{table}.{item.name}", "default": argparse.SUPPRESS, "help": _help(item)}
        if item.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            facts = item.metadata
            choices = "{" + ",".join(map(str, facts["choices"])) + "}" if facts["choices"] else _metavar(item)
            group.add_argument(flag, type=_TYPES[str(item.type)], metavar=choices, **common)


def _metavar(item: dataclasses.Field[Any]) -> str:
    return {"int": "N", "float": "X"}.get(str(item.type), "TEXT")


def _help(item: dataclasses.Field[Any]) -> str:
    facts = item.metadata
    limits = []
    if facts["low"] is not None:
        limits.append(f"{_number(facts['low'])} to {_number(facts['high'])}")
    if facts["unit"]:
        limits.append(facts["unit"])
    default = item.default if item.default != "" else "empty"
    inner = ", ".join([" ".join(limits)] * bool(limits) + [f"default {default}"])
    return f"{facts['help']} ({inner})".replace("%", "%%")


def _number(value: float) -> str:
    return f"{int(value):_}" if abs(value) >= 100_000 else f"{value:g}"


def given(args: argparse.Namespace, table: str) -> dict[str, Any]:
    """The fields of `table` that were set by flags."""
    start = f"{table}."
    return {name.removeprefix(start): value for name, value in vars(args).items() if name.startswith(start)}


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """The --config flag of commands that read tables."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with the tables [model], [engine], [server], [history]; flags win"
    )


def tables_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The tables of --config, each overlaid with the flags that were given."""
    path = args.config
    tables = read_toml(path) if path else {name: {} for name in ("model", "engine", "server", "history")}
    return {name: {**table, **given(args, name)} for name, table in tables.items()}


def build(config: type[C], args: argparse.Namespace, table: str) -> C:
    """`config` from flags alone."""
    return config.from_table(given(args, table))


def check_writable(path: str | None, field: str) -> None:
    """Raise InvalidArgument when a file cannot be written at `path` for want of its folder: before hours of work."""
    if path and not Path(path).resolve().parent.is_dir():
        raise InvalidArgument(f"{Path(path).parent} is not a folder", field=field)
