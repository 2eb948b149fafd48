from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mtserve
from mtserve.cli import COMMANDS, main
from mtserve.cli.generator_flags import PREFIXES
from mtserve.config import Config, EngineConfig, HistoryConfig, ServerConfig
from mtserve.history.open import open_history
from mtserve.model.presets import build, default_schema
from mtserve.model.weights import fingerprint, save
from mtserve.trace.generator.config import PARTS, GeneratorConfig
from mtserve.trace.importers.config import ImportConfig
from mtserve.trace.io import read_trace
from mtserve.trace.replay.config import ReplayConfig
from mtserve.trace.simulate.config import SimulateConfig

Capture = pytest.CaptureFixture[str]


def _help(capsys: Capture, *words: str) -> str:
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


GENERATOR = ((GeneratorConfig, ""), *((part, PREFIXES[name]) for name, part in PARTS.items()))


@pytest.mark.parametrize(
    ("words", "configs"),
    [
        (("replay",), ((EngineConfig, ""), (ReplayConfig, ""))),
        (("serve",), ((EngineConfig, ""), (ServerConfig, ""), (HistoryConfig, "history-"))),
        (("simulate",), ((SimulateConfig, ""), *GENERATOR)),
        (("trace", "generate"), GENERATOR),
        (("trace", "import"), ((ImportConfig, ""),)),
    ],
)
def test_help_has_every_field_with_its_limits(
    words: tuple[str, ...], configs: tuple[tuple[type[Config], str], ...], capsys: Capture
) -> None:
    text = " ".join(_help(capsys, *words).split())
    assert f"usage: mtserve {' '.join(words)}" in text
    assert "example" in text
    for config, prefix in configs:
        for item in filter(lambda item: item.metadata, dataclasses.fields(config)):  # type: ignore[arg-type]
            flag = f"--{prefix}{item.name.replace('_', '-')}"
            entry = re.search(rf" {flag}[ ,].*?\((?:[^()]|\([^()]*\))*default [^)]*\)", text)
            assert entry, flag
            assert item.metadata["unit"] in entry[0]
            if item.metadata["low"] is not None:
                assert " to " in entry[0]


def test_help_of_the_whole_names_every_command_and_is_quick(capsys: Capture) -> None:
    text = _help(capsys)
    assert all(name in text for name in COMMANDS)
    code = "import sys; from mtserve.cli import main; main(['--help']); main(['replay', '--help']); main(['serve', '--help'])"
    command = [sys.executable, "-c", code + "; print('heavy', {'torch', 'numpy', 'rich', 'grpc'} & set(sys.modules))"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.endswith("heavy set()\n")


def test_version_and_usage_errors(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mtserve {mtserve.__version__}\n"
    for words in ([], ["fly"], ["trace"], ["trace", "generate"], ["replay"], ["serve", "--prot", "1"]):
        assert main(words) == 2
        assert "usage: mtserve" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtserve.cli.inspect.run", interrupt)
    assert main(["inspect"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_generate_then_info(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "made.jsonl.gz"
    words = ["--users", "4", "--requests", "9", "--seed", "7", "--history-median", "5", "--items", "300"]
    assert main(["trace", "generate", *words, "--out", str(path)]) == 0
    assert "9 requests of 4 users" in capsys.readouterr().out
    assert read_trace(path).requests == 9
    assert main(["trace", "info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 9
    assert main(["trace", "info", str(path)]) == 0
    assert "calibrated-synthetic, seed 7" in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    assert "calibrated-synthetic, seed 7" in capsys.readouterr().out


def test_generate_takes_its_parts_from_a_file_and_flags_win(tmp_path: Path, capsys: Capture) -> None:
    path, config = tmp_path / "made.jsonl.gz", tmp_path / "week.toml"
    config.write_text(
        "[generator]\nusers = 40\nrequests = 400\nhistory_median = 5\n[generator.crowds]\nevents = 2\nload = 0.5\n"
        "[generator.groups.early]\nshare = 0.2\nlater = 20\n[generator.groups.heavy]\n"
    )
    words = ["--config", str(config), "--crowd-load", "10", "--bursts-like", "code", "--out", str(path)]
    assert main(["trace", "generate", *words]) == 0
    made = read_trace(path).meta.config
    assert (made["users"], made["crowds.events"], made["crowds.load"], made["bursts.like"]) == (40, 2, 10.0, "code")
    assert made["groups"] == "early:share=0.2,later=20 heavy"
    assert "launches.items" not in made
    for text, message in (
        ("[generator.crowds]\nevents = -1\n", "crowds.events: -1 is outside 0 to"),
        ("[generator]\ncrowds = 3\n", "crowds: expected a table"),
        ("[generator.groups]\nearly = 3\n", "groups.early: expected a table"),
        ("[generator.groups.early]\nlater = 3\n", "groups.early: needs a share"),
        ("[generator.groups.heavy]\nspeed = 3\n", "groups.heavy.speed: unknown field"),
        ("[generators]\nusers = 3\n", "generators: unknown table"),
    ):
        config.write_text(text)
        capsys.readouterr()
        assert main(["trace", "generate", "--config", str(config), "--out", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_import_converts_a_log(tmp_path: Path, capsys: Capture) -> None:
    source, path = tmp_path / "ratings.csv", tmp_path / "out.jsonl"
    rows = [f"{user},{10 * user + i},4.0,{1_000_000_000 + 100 * i}" for user in (1, 2) for i in range(4)]
    source.write_text("\n".join(["userId,movieId,rating,timestamp", *rows]) + "\n")
    words = ["trace", "import", "movielens", str(source), "--negatives", "2", "--out", str(path)]
    assert main(words) == 0
    assert read_trace(path).users == 2
    assert "of 2 users" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--users", "0", "--out", "x.jsonl"], "users: 0 is outside 1 to"),
        (["generate", "--out", "x.csv"], "path: x.csv does not end in"),
        (["generate", "--out", "no/such/folder/x.jsonl"], "out: no/such/folder is not a folder"),
        (["import", "netflix", "a.csv", "--out", "x.jsonl"], "kind: 'netflix' is not one of"),
        (["import", "mind", "absent.tsv", "--out", "x.jsonl"], "paths: absent.tsv is not a file"),
        (["info", "absent.jsonl"], "path: absent.jsonl is not a file"),
    ],
)
def test_trace_errors_are_one_line(words: list[str], message: str, capsys: Capture) -> None:
    assert main(["trace", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"mtserve trace: {message}")


def test_inspect_tells_a_model_s_memory(tmp_path: Path, capsys: Capture) -> None:
    path, model = tmp_path / "m.safetensors", build("tiny", seed=3)
    save(model, path)
    assert main(["inspect", str(path), "--behaviours", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fingerprint"] == fingerprint(model)
    # K and V of 2 layers x 2 heads x 16; 3 U tokens and 100 behaviours take 2 pages of 64.
    assert found["states"]["bfloat16"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert found["states"]["float32"]["bytes_per_user"] == 2 * 64 * 512
    assert found["states"]["float32"]["users_per_gib"] == 2**30 / (2 * 64 * 512)
    assert found["states"]["fp8"]["users_per_gib"] == 4 * found["states"]["float32"]["users_per_gib"]
    assert sum(found["parameters"].values()) == sum(p.numel() for p in model.parameters())
    assert main(["inspect"]) == 0
    assert "mtgr-large: 15 layers" in capsys.readouterr().out
    assert main(["inspect", "tiny"]) == 0
    assert "bytes_per_token: 256 (256 B)" in capsys.readouterr().out
    assert main(["inspect", "tiny", "--behaviours", "257"]) == 2
    assert main(["inspect", "nope"]) == 2


def test_inspect_counts_and_checks_histories(tmp_path: Path, capsys: Capture) -> None:
    schema, folder = default_schema(), tmp_path / "histories"
    with open_history(HistoryConfig(path=str(folder)), schema) as history:
        for user, count in (("a", 3), ("b", 70)):
            rows = schema.behaviours({"time_ms": list(range(count)), "item": list(range(count))})
            history.put_user(user, schema.user_row({"segment": 1}), rows)
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["users"], found["behaviours_kept"], found["behaviours_ever"]) == (2, 73, 73)
    assert found["check"] == "ok"
    assert found["features"]["behaviour"] == [feature.name for feature in schema.behaviour]
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no histories" in capsys.readouterr().err
    assert not (tmp_path / "lock").exists()


def test_serve_listens_and_drains(tmp_path: Path) -> None:
    words = ["--model", "tiny", "--device", "cpu", "--gpu-cache", "1MiB", "--host-cache", "1MiB", "--port", "0"]
    words += ["--metrics-port", "0", "--history-path", str(tmp_path / "histories"), "--chaos", "fail=0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "mtserve", "serve", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        lines: list[str] = []
        end = time.monotonic() + 60
        while time.monotonic() < end and not (lines and lines[-1].startswith("listening on ")):
            line = server.stdout.readline()
            assert line, server.communicate()
            lines.append(line)
        text = "".join(lines)
        assert "histories: 0 users, in" in text
        assert "gpu tier: 1.0 MiB, 32 pages of 64 tokens: 6 users of 256 behaviours" in text
        assert "chaos: fail=0.5: copies between the tiers" in text
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=30)
        assert server.returncode == 0, errors
        assert (tmp_path / "histories" / "history.sqlite").is_file()
    finally:
        server.kill()
        server.wait()


def test_serve_refuses_bad_tables(tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "mtserve.toml"
    for text, message in (
        ("[server]\nprot = 1\n", "prot: unknown field"),
        ("[sever]\nport = 1\n", "sever: unknown table"),
        ("[model]\nlayers = 0\n", "layers: 0 is outside 1 to 128"),
        ("[model]\nsource = 'tiny'\nseed = -1\n", "model.seed: -1 is not"),
        ("[engine]\npage_tokens = '64'\n", "page_tokens: expected int"),
        ("[engine]\nchaos = 'often'\n", "chaos: 'often' is not fail=SHARE"),
    ):
        config.write_text(text)
        assert main(["serve", "--config", str(config), "--history-kind", "memory"]) == 2
        assert capsys.readouterr().err.startswith(f"mtserve serve: {message}")
