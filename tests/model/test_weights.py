"""Files that come back as they went, or say what is wrong; fingerprints that notice anything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SCHEMA, START_MS, make_behaviours, make_candidates, small_model

from mtserve.errors import InvalidArgument, NotFound
from mtserve.model.reference import recompute
from mtserve.model.schema import Feature
from mtserve.model.weights import FORMAT, fingerprint, load, save
from mtserve.types import History


def _header(model: Any) -> dict[str, str]:
    content = {"config": dataclasses.asdict(model.config), "schema": model.schema.to_json()}
    return {"format": FORMAT, "mtserve": json.dumps(content)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model(4, tasks=("ctr", "cvr", "like")).to(dtype)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert (loaded.config, loaded.schema, loaded.dtype) == (model.config, model.schema, dtype)
    assert fingerprint(loaded) == fingerprint(model)
    rng = np.random.default_rng(0)
    history, candidates = History(None, 0, make_behaviours(rng, 9)), make_candidates(rng, 3, START_MS * 2)
    if dtype == torch.float32:
        assert torch.equal(recompute(loaded, history, candidates), recompute(model, history, candidates))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 100])
def test_what_is_no_model_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match="not a safetensors file"):
        load(path)
    with pytest.raises(NotFound, match="is not a file"):
        load(tmp_path / "absent")
    with pytest.raises(NotFound):
        load(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "format is None"),
        ({"format": "mtserve-model-9"}, "mtserve-model-9"),
        ({"format": FORMAT}, "broken header"),
        ({"format": FORMAT, "mtserve": "{"}, "broken header"),
        ({"format": FORMAT, "mtserve": "[]"}, "broken header"),
        ({"format": FORMAT, "mtserve": '{"config": {"tasks": ["ctr"]}, "schema": "[]"}'}, "not a feature schema"),
        ({"format": FORMAT, "mtserve": '{"config": {"tasks": ["ctr"], "d": 2}, "schema": "{}"}'}, "d: 2 is outside"),
        ({"format": FORMAT, "mtserve": '{"config": {"tasks": ["ctr"], "depth": 2}, "schema": "{}"}'}, "unknown field"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.zeros(1)}, str(path), metadata=metadata)
    with pytest.raises(InvalidArgument, match=message):
        load(path)


def test_wrong_tensors_are_refused_by_name(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "m.safetensors"
    save(model, path)
    tensors = load_file(str(path))
    for change, message in (
        ({"position": tensors["position"][:3].clone()}, r"position: expected shape \(40, 16\), got \(3, 16\)"),
        ({"position": None}, "1 tensors are missing or unknown, the first is position"),
        ({"extra": torch.zeros(1)}, "the first is extra"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, str(path), metadata=_header(model))
        with pytest.raises(InvalidArgument, match=message):
            load(path)


def test_tensors_of_another_type_are_refused(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "m.safetensors"
    save(model, path)
    tensors = load_file(str(path))
    for dtype in (torch.int32, torch.float16):
        save_file(tensors | {"hour": tensors["hour"].to(dtype)}, str(path), metadata=_header(model))
        with pytest.raises(InvalidArgument, match="hour"):
            load(path)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, str(path), metadata=_header(model))
    with pytest.raises(InvalidArgument, match="float64"):
        load(path)


def test_the_fingerprint_changes_with_any_single_weight() -> None:
    model = small_model()
    seen = {fingerprint(model)}
    for _, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.tensor(float("inf")))
        seen.add(fingerprint(model))
        flat[-1] = kept
    assert len(seen) == 1 + len(list(model.parameters()))
    assert fingerprint(model) in seen


def test_the_fingerprint_changes_with_configuration_schema_and_type() -> None:
    model = small_model()
    seen = {fingerprint(model), fingerprint(small_model().to(torch.bfloat16)), fingerprint(small_model(1))}
    for changes in (
        {"attention_length": 9}, {"gate_first": True}, {"max_realtime": 9}, {"static_attention": "causal"},
        {"history_low_water": 0.5},
    ):  # fmt: skip
        seen.add(fingerprint(small_model(**changes)))
    renamed = Feature("watch", kind="dense", width=1)
    schema = dataclasses.replace(SCHEMA, behaviour=(SCHEMA.behaviour[0], renamed))
    seen.add(fingerprint(small_model(schema=schema)))
    assert len(seen) == 9
    assert fingerprint(small_model()) == fingerprint(model)
