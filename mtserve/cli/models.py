"""The model that a command line or a [model] table names."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtserve.config import ModelConfig
from mtserve.errors import InvalidArgument

if TYPE_CHECKING:
    from mtserve.model.ranking import RankingModel

DEFAULT = "tiny"
MAX_SEED = 2**31 - 1


def add_model(parser: argparse.ArgumentParser, *, seed: bool, default: str = DEFAULT) -> None:
    """--model, and --seed where nothing else of the command has one."""
    parser.add_argument(
        "--model",
        dest="model.source",
        metavar="NAME|FILE",
        default=argparse.SUPPRESS,
        help=f"a preset (see `mtserve inspect`), its weights seeded and untrained, or a .safetensors file (default {default})",
    )
    if seed:
        parser.add_argument(
            "--seed",
            dest="model.seed",
            type=int,
            metavar="N",
            default=argparse.SUPPRESS,
            help="seed of a preset's weights (default 0)",
        )


def load_model(table: dict[str, Any]) -> RankingModel:
    """The model of a [model] table: `source` (preset or file), `seed`, and fields that change a preset's configuration."""
    fields = dict(table)
    source, seed = str(fields.pop("source", DEFAULT)), fields.pop("seed", 0)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise InvalidArgument(f"{seed!r} is not an integer of 0 to {MAX_SEED}", field="model.seed")
    if is_file(source):
        if fields:
            raise InvalidArgument("a model file brings its own configuration", field=f"model.{min(fields)}")
        from mtserve.model.weights import load

        return load(source)
    return _preset(source, seed, fields)


def model_shape(source: str) -> tuple[ModelConfig, int]:
    """(configuration, number of U features) of the model that `source`, a preset or a file, names."""
    if is_file(source):
        model = load_model({"source": source})
        return model.config, len(model.schema.user)
    from mtserve.model.presets import default_schema, preset

    return preset(source), len(default_schema().user)


def is_file(source: str) -> bool:
    """Whether `source` names a file rather than a preset."""
    return source.endswith(".safetensors") or Path(source).is_file()


def _preset(name: str, seed: int, fields: dict[str, Any]) -> RankingModel:
    from mtserve.model.presets import build, preset
    from mtserve.model.ranking import RankingModel
    from mtserve.model.weights import initialise

    if not fields:
        return build(name, seed=seed)
    config = ModelConfig.from_table({**dataclasses.asdict(preset(name)), **fields})
    return initialise(RankingModel(config, build(name, seed=seed).schema), seed)
