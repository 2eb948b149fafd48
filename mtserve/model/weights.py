"""Seeded initialisation, safetensors files, and the fingerprint that enters every cache key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mtserve.config import ModelConfig
from mtserve.errors import InvalidArgument, NotFound
from mtserve.model.ranking import RankingModel
from mtserve.model.schema import FeatureSchema

FORMAT = "mtserve-model-1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def initialise(model: RankingModel, seed: int) -> RankingModel:
    """Fill every parameter from `seed` and its own name, whatever the order of construction; returns `model`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The CPU generator looks at 32 bits of its seed only, so both must be hashed into these.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * _scale(name, parameter.shape) + _offset(name))
            parameter.requires_grad_(False)
    return model


def _scale(name: str, shape: torch.Size) -> float:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("uvqk_weight", "output_weight"):  # [in, out]
        return float(shape[0] ** -0.5)
    if leaf == "weight" and len(shape) == 2:  # nn.Linear: [out, in]
        return float(shape[1] ** -0.5)
    if name.startswith("tables."):
        return 1.0
    return 0.1


def _offset(name: str) -> float:
    return 1.0 if name.endswith(("norm_weight", "gate_weight")) else 0.0


def fingerprint(model: RankingModel) -> str:
    """Hex SHA-256 of everything a state depends on: configuration, schema, dtype and every weight."""
    digest = hashlib.sha256(_header(model).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header(model: RankingModel) -> str:
    return json.dumps({"config": dataclasses.asdict(model.config), "schema": model.schema.to_json()}, sort_keys=True)


def save(model: RankingModel, path: str | Path) -> None:
    """Write weights, configuration and schema as one safetensors file."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, str(path), metadata={"format": FORMAT, "mtserve": _header(model)})


def load(path: str | Path) -> RankingModel:
    """The model of a file written by `save`. Raises NotFound or InvalidArgument naming what is wrong."""
    if not Path(path).is_file():
        raise NotFound(f"{path} is not a file", field="model")
    try:
        with safe_open(str(path), framework="pt") as file:
            config, schema = _parse_header(file.metadata() or {})
            model = RankingModel(config, schema)
            _copy_tensors(model, file)
    except SafetensorError as error:
        raise InvalidArgument(f"{path} is not a safetensors file: {error}", field="model") from None
    return model


def _parse_header(metadata: dict[str, str]) -> tuple[ModelConfig, FeatureSchema]:
    if metadata.get("format") != FORMAT:
        raise InvalidArgument(f"format is {metadata.get('format')!r}, expected {FORMAT!r}", field="model")
    try:
        header = json.loads(metadata["mtserve"])
        header["config"]["tasks"] = tuple(header["config"]["tasks"])
        return ModelConfig.from_table(header["config"]), FeatureSchema.from_json(header["schema"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidArgument(f"broken header: {error!r}", field="model") from None


def _copy_tensors(model: RankingModel, file: safe_open) -> None:
    parameters = dict(model.named_parameters())
    if set(parameters) != set(file.keys()):
        odd = sorted(set(parameters) ^ set(file.keys()))
        raise InvalidArgument(f"{len(odd)} tensors are missing or unknown, the first is {odd[0]}", field="model")
    dtype = file.get_tensor("position").dtype
    if dtype not in DTYPES:
        raise InvalidArgument(f"position: {dtype} is not one of {', '.join(map(str, DTYPES))}", field="model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = file.get_tensor(name)
            if tensor.dtype != dtype:
                raise InvalidArgument(f"{name}: expected {dtype} as of position, got {tensor.dtype}", field="model")
            if tensor.shape != parameter.shape:
                raise InvalidArgument(
                    f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}", field="model"
                )
            parameter.data = tensor
            parameter.requires_grad_(False)
