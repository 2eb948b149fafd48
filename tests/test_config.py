"""Configuration: each field refuses what lies outside its range, by name; nothing unknown is ignored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve.config import Config, EngineConfig, HistoryConfig, ModelConfig, ServerConfig, read_toml
from mtserve.errors import InvalidArgument
from mtserve.units import format_bytes, parse_capacity

CLASSES: list[type[Config]] = [ModelConfig, EngineConfig, HistoryConfig, ServerConfig]
FIELDS: list[tuple[type[Config], Any]] = [
    (cls, field)
    for cls in CLASSES
    for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    if field.metadata
]
RANGED = [(cls, field) for cls, field in FIELDS if field.metadata["low"] is not None]
CHOSEN = [(cls, field) for cls, field in FIELDS if field.metadata["choices"]]


def _names(pairs: list[tuple[type[Config], Any]]) -> list[str]:
    return [f"{cls.__name__}.{field.name}" for cls, field in pairs]


def _refused(cls: type[Config], **values: Any) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        cls(**values)
    return caught.value


@pytest.mark.parametrize(("cls", "field"), RANGED, ids=_names(RANGED))
def test_ranges_are_kept(cls: type[Config], field: Any) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    small = 1 if field.type == "int" else 0.001
    for value in (low - small, high + small, float("nan") if field.type == "float" else -(10**30)):
        error = _refused(cls, **{field.name: value})
        assert error.field == field.name
        assert f"{low} to {high}" in str(error)
    others = {"max_realtime": {"max_history": 1_000_000}, "max_history": {"max_realtime": 1}}.get(field.name, {})
    for value in (low, high):
        if value == low or field.name != "max_realtime":
            assert getattr(cls(**{**others, field.name: value}), field.name) == value


@pytest.mark.parametrize(("cls", "field"), CHOSEN, ids=_names(CHOSEN))
def test_choices_are_kept(cls: type[Config], field: Any) -> None:
    error = _refused(cls, **{field.name: "something else"})
    assert error.field == field.name
    for choice in field.metadata["choices"]:
        assert choice in str(error)
        assert getattr(cls(**{field.name: choice}), field.name) == choice


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=_names(FIELDS))
def test_types_are_kept(cls: type[Config], field: Any) -> None:
    wrong: dict[str, Any] = {"int": 1.5, "float": "1", "str": 3, "bool": "yes"}
    for value in (wrong[field.type], None, True if field.type != "bool" else 1):
        assert _refused(cls, **{field.name: value}).field == field.name


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_explains_itself_and_none_can_be_changed(cls: type[Config]) -> None:
    config = cls()
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert field.name == "tasks" or field.metadata["help"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_fields_are_refused_by_name(cls: type[Config]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        cls.from_table({"page_tokenz": 3})
    assert caught.value.field == "page_tokenz"
    assert "known are" in str(caught.value)
    assert cls.from_table({}) == cls()


def test_fields_that_must_fit_together() -> None:
    assert _refused(ModelConfig, max_history=10, max_realtime=11).field == "max_realtime"
    for tasks in ((), ("ctr", "ctr"), tuple(map(str, range(65)))):
        assert _refused(ModelConfig, tasks=tasks).field == "tasks"
    assert ModelConfig.from_table({"tasks": ["like"]}).tasks == ("like",)
    assert ModelConfig(layers=3, heads=5, head_dim=8).state_values_per_token == 2 * 3 * 5 * 8


@pytest.mark.parametrize("host_format", ["kv8", "x8", "x4"])
def test_packed_twins_of_fp8_states_are_refused(host_format: str) -> None:
    refused = _refused(EngineConfig, gpu_format="fp8", host_format=host_format)
    assert refused.field == "gpu_format"
    assert f"host_format = '{host_format}'" in str(refused)
    assert EngineConfig(gpu_format="fp8").host_format == "kv"


def test_files_hold_one_table_a_class(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('[engine]\npage_tokens = 32\n[server]\nhost = "::"\n', encoding="utf-8")
    tables = read_toml(path)
    assert tables == {"model": {}, "engine": {"page_tokens": 32}, "server": {"host": "::"}, "history": {}}
    assert EngineConfig.from_table(tables["engine"]).page_tokens == 32


@pytest.mark.parametrize(
    ("content", "field"),
    [(b"[motor]\nx = 1\n", "motor"), (b"engine = 3\n", "engine"), (b"[engine\n", "config"), (b"\xff\xfe", "config")],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, field: str) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        read_toml(path)
    assert caught.value.field == field
    with pytest.raises(InvalidArgument, match="does not exist"):
        read_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("17", 17), (17, 17), ("17B", 17), ("1KiB", 1024), ("1 kb", 1000), ("1.5GiB", 3 << 29),
        ("2TB", 2 * 10**12), (" 20 MiB ", 20 << 20), ("50%", 500), ("12.5%", 125), ("0%", 0), ("100%", 1000),
    ],
)  # fmt: skip
def test_capacities(text: str | int, size: int) -> None:
    assert parse_capacity(text, of=1000, field="x") == size


@pytest.mark.parametrize(
    "text", ["", "much", "1XB", "-1", -1, "101%", "1e9", "1,5GiB", "2000TiB", 2**50, "% 5", "5 GiB x"]
)
def test_what_is_no_capacity(text: str | int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_capacity(text, of=1000, field="gpu_cache")
    assert caught.value.field == "gpu_cache"


@given(count=st.integers(0, 2**49))
def test_printed_bytes_parse_back_to_about_the_same(count: int) -> None:
    assert abs(parse_capacity(format_bytes(count), of=0, field="x") - count) <= 0.05 * max(count, 1) + 1


def test_printed_bytes() -> None:
    printed = [format_bytes(count) for count in (0, 1023, 1024, 1536, 5 << 20, 3 << 40)]
    assert printed == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 TiB"]
