"""The generator's flags, for whoever draws a trace."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from mtserve.cli.flags import add_fields, given
from mtserve.trace.generator.config import PARTS, GeneratorConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

PREFIXES = {"week": "", "bursts": "bursts-", "crowds": "crowd-", "newcomers": "newcomer-", "launches": "launch-"}
"""What the flags of a part of the generator's configuration begin with."""


def add_generator(parser: argparse.ArgumentParser, title: str = "generator") -> None:
    """Add a flag for each field of GeneratorConfig and its parts."""
    plain = [item.name for item in dataclasses.fields(GeneratorConfig) if item.name not in PARTS]
    add_fields(parser, GeneratorConfig, "generator", only=plain, title=title)
    for name, part in PARTS.items():
        add_fields(parser, part, name, prefix=PREFIXES[name], title=f"{title}: {name}")


def given_to_generator(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, by field; fields of a part are in a table of its name."""
    parts = {name: given(args, name) for name in PARTS}
    return given(args, "generator") | {name: table for name, table in parts.items() if table}


def generator_config(args: argparse.Namespace, table: Mapping[str, Any]) -> GeneratorConfig:
    """From a `table` [generator], and the flags over it."""
    merged = dict(table)
    for name, value in given_to_generator(args).items():
        part = merged.get(name, {}) if name in PARTS else None
        # What is no table is left for the configuration to refuse.
        merged[name] = part | value if isinstance(part, dict) else value if part is None else part
    return GeneratorConfig.from_table(merged)
