"""The order of imports: base <- {cache, kernels} <- {transfer, model, restore} <- engine <- server <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mtserve"
BASE = {"base", "proto"}
ENGINE = BASE | {"cache", "kernels", "transfer", "model", "restore", "history", "engine"}
ALLOWED: dict[str, set[str]] = {
    "base": {"base"},
    "proto": {"proto"},
    "cache": {"base", "cache"},
    "kernels": {"base", "kernels"},
    "transfer": {"base", "cache", "kernels", "transfer"},
    "model": {"base", "cache", "kernels", "model"},
    "restore": {"base", "restore"},
    "history": {"base", "model.schema", "history"},
    "engine": ENGINE - {"proto"},
    "trace": (ENGINE - {"proto"}) | {"trace"},
    "server": ENGINE | {"server"},
    "cli": ENGINE | {"server", "trace", "cli"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path) -> Iterator[str]:
    """Every module of ours that `path` names in an import, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            # `from mtserve.model import schema` imports a module too.
            yield from (
                name
                for name in (f"{node.module}.{alias.name}" for alias in node.names)
                if (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists()
            )


def _layer(module: str) -> str:
    """ "base" for what lies directly in the package, else the folder."""
    parts = module.split(".")
    folders = {"cli": "cli", "__main__": "cli"}
    if len(parts) < 2 or (PACKAGE / f"{parts[1]}.py").exists() or parts[1].startswith("_"):
        return folders.get(parts[1] if len(parts) > 1 else "", "base")
    return folders.get(parts[1], parts[1] if (PACKAGE / parts[1]).is_dir() else "base")


def _may(importer: str, imported: str) -> bool:
    allowed = ALLOWED[_layer(importer)]
    return _layer(imported) in allowed or imported.removeprefix("mtserve.") in allowed


@pytest.mark.parametrize("path", MODULES, ids=[_name(path) for path in MODULES])
def test_modules_import_only_what_lies_below_them(path: Path) -> None:
    module = _name(path)
    if module == "mtserve":
        return  # names everything, for type checkers alone; that it imports nothing is tested below
    for imported in _imported(path):
        if imported.split(".")[0] == "mtserve":
            assert _may(module, imported), f"{module} imports {imported}"


ROOMS = sorted(path.name for path in (PACKAGE / "trace").iterdir() if (path / "__init__.py").exists())


def _room(module: str) -> str:
    """The folder of `trace` that a module lies in; "" for what all of them share."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["mtserve", "trace"] and len(parts) > 2 and parts[2] in ROOMS else ""


def _rooms_entered(path: Path) -> set[str]:
    """Rooms other than its own that a module of `trace` imports from."""
    return {room for room in map(_room, _imported(path)) if room} - {_room(_name(path))}


@pytest.mark.parametrize("path", sorted((PACKAGE / "trace").rglob("*.py")), ids=_name)
def test_rooms_of_the_trace_import_what_they_share_and_not_each_other(path: Path) -> None:
    assert not _rooms_entered(path), _name(path)


def test_rooms_are_found() -> None:
    assert {"generator", "importers", "replay", "simulate"} == set(ROOMS)
    assert _room("mtserve.trace.simulate.demand") == "simulate" and _room("mtserve.trace.schema") == ""
    assert _rooms_entered(PACKAGE / "cli" / "simulate.py") >= {"generator", "simulate"}


# The engine's rooms from the ground up; what lies in `engine` itself may use all of them.
FLOORS = ("request", "queue", "tiers", "forward", "")


def _floor(module: str) -> int | None:
    """Place in FLOORS of a module of the engine; None for others."""
    parts = module.split(".")
    if parts[:2] != ["mtserve", "engine"] or len(parts) < 3:
        return None
    return FLOORS.index(parts[2]) if (PACKAGE / "engine" / parts[2]).is_dir() else FLOORS.index("")


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").rglob("*.py")), ids=_name)
def test_rooms_of_the_engine_import_from_below(path: Path) -> None:
    own = _floor(_name(path))
    above = [name for name in _imported(path) if own is not None and (_floor(name) or 0) > own]
    assert not above, _name(path)


def test_floors_are_found() -> None:
    rooms = {path.name for path in (PACKAGE / "engine").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(FLOORS) - {""}
    assert _floor("mtserve.engine.forward.graphs") == 3 and _floor("mtserve.engine.core") == 4
    assert _floor("mtserve.engine") is None and _floor("mtserve.cache.index") is None


@pytest.mark.parametrize("layer", ["cache", "history", "proto", "restore"])
def test_layers_without_torch(layer: str) -> None:
    for path in (PACKAGE / layer).rglob("*.py"):
        names = {name.split(".")[0] for name in _imported(path)}
        assert "torch" not in names, _name(path)


def test_the_rules_can_be_broken() -> None:
    assert len(MODULES) > 40
    assert {_layer(_name(path)) for path in MODULES} <= set(ALLOWED)
    assert not _may("mtserve.cache.index", "mtserve.engine.engine")
    assert not _may("mtserve.transfer.mover", "mtserve.model.hstu")
    assert not _may("mtserve.history.store", "mtserve.model.ranking")
    assert not _may("mtserve.restore.choice", "mtserve.transfer.mover")
    assert not _may("mtserve.server.server", "mtserve.trace.schema")
    assert not _may("mtserve.engine.core", "mtserve.trace.schema")
    assert _may("mtserve.history.store", "mtserve.model.schema")
    assert _may("mtserve.cache.index", "mtserve._core")


@pytest.mark.parametrize(
    "module", ["mtserve", "mtserve.config", "mtserve.cache.index", "mtserve.history", "mtserve.server.client"]
)
def test_what_must_stay_cheap_to_import_does_not_bring_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"{module} imports torch"


def test_names_of_the_package_arrive_when_first_used() -> None:
    import mtserve

    for name in mtserve.__all__:
        assert getattr(mtserve, name) is not None
    with pytest.raises(AttributeError, match="Motor"):
        _ = mtserve.Motor
