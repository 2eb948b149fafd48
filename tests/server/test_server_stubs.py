"""The committed stubs are those of the committed proto."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script() -> ModuleType:
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("generate_proto", ROOT / "scripts" / "generate_proto.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_stubs_are_fresh(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0


def test_check_notices_a_changed_proto(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, package = tmp_path / script.SOURCE, tmp_path / script.PACKAGE
    source.mkdir(parents=True)
    package.mkdir(parents=True)
    text = (ROOT / script.SOURCE / "ranking.proto").read_text()
    (source / "ranking.proto").write_text(text)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    (source / "ranking.proto").write_text(text.replace("uint32 deadline_ms = 6", "uint32 deadline_ms = 16"))
    assert script.main(["--check"]) == 1
    assert "stale: mtserve/proto/v1/ranking_pb2.py" in capsys.readouterr().out
