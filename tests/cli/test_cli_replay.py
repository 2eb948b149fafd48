from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtserve.cli import main
from mtserve.engine.forward.runner import Runner
from mtserve.model.presets import build
from mtserve.model.weights import save
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.io import write_trace
from mtserve.trace.replay import agreement

ENGINE = ["--device", "cpu", "--page-tokens", "16", "--gpu-cache", "40%ws", "--host-cache", "100%ws"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("trace") / "small.jsonl.gz"
    write_trace(generate(GeneratorConfig(users=5, requests=20, history_median=30, items=300)), path)
    return str(path)


def test_replay_prints_tables_and_writes_json_and_plots(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "result.json"
    plots = tmp_path / "plots"
    assert main(["replay", trace, "--verify", "2", "--json", str(target), "--report", str(plots), *ENGINE]) == 0
    out, err = capsys.readouterr()
    for words in (
        "calibrated-synthetic",
        "20 requests of ",
        "speedup (throughput)",
        "pages evicted",
        "scores agree",
    ):
        assert words in out
    assert "requests without cache: 20" in err
    found = json.loads(target.read_text())
    assert found["device"] == "cpu"
    assert found["hit_ratio"]["request"].keys() == found["hit_ratio"]["token"].keys() == {"gpu", "host", "total"}
    assert found["agreement"]["verified"]["requests"] == 2
    assert found["max_score_difference"] <= 1e-5
    assert found["padded_rows_share"] is None
    assert "padding" not in out
    assert found["chaos"] is None
    assert "chaos" not in out
    assert "copies in that failed" not in out
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())
    assert len(list(plots.iterdir())) == 5


def test_replay_tells_where_its_time_went(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "result.json"
    words = ["replay", trace, "--verify", "0", "--baseline-requests", "4", "--json", str(target), *ENGINE]
    assert main(words) == 0
    found = json.loads(target.read_text())
    lines = capsys.readouterr().out.partition("Where the time went")[2].splitlines()
    assert any("without: the first 4 requests" in line for line in lines)
    rows = {cells[1].split(":")[0].strip(): cells[2:-1] for cells in (line.split("│") for line in lines) if cells[2:]}
    for place, time in ((0, found["time"]), (2, found["baseline"]["time"])):
        told = {**time["loop"], "wall time": time["wall_s"], "batches under way": time["batches_s"]}
        told |= {"loads under way": time["load_s"], "stores under way": time["store_s"]}
        assert {name: float(cells[place]) for name, cells in rows.items()} == pytest.approx(told, abs=6e-4)
        shares = {name: 100 * seconds / time["wall_s"] for name, seconds in told.items()}
        assert {name: float(cells[place + 1]) for name, cells in rows.items()} == pytest.approx(shares, abs=0.06)


def test_without_a_baseline_its_time_is_left_blank(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", trace, "--verify", "1", "--baseline-requests", "0", *ENGINE]) == 0
    lines = capsys.readouterr().out.partition("Where the time went")[2].splitlines()
    (line,) = (line for line in lines if "device: waiting for a batch" in line)
    assert [cell.strip() for cell in line.split("│")[4:6]] == ["-", "-"]


def test_padding_is_shown_where_the_runner_pads(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Runner.stats

    def stats(runner: Runner) -> dict[str, Any]:
        rows = counted(runner)["rows"]  # as many again are padding
        return {"rows": 2 * rows, "padded_rows": rows, "padded_rows_share": 0.5}

    monkeypatch.setattr(Runner, "stats", stats)
    assert main(["replay", trace, "--verify", "1", "--baseline-requests", "4", *ENGINE]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "rows computed as padding, %" in line)
    assert line.count("50.0") == 2


def test_replay_takes_a_model_file_and_a_configuration_file(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config, target = (tmp_path / name for name in ("m.safetensors", "mtserve.toml", "r.json"))
    save(build("tiny", seed=4), model)
    config.write_text(f'[model]\nsource = "{model}"\n[engine]\ndevice = "cpu"\npage_tokens = 8\nmax_queue = 100\n')
    words = ["replay", trace, "--config", str(config), "--max-queue", "50", "--verify", "0", "--json", str(target)]
    assert main([*words, "--speed", "1e7", "--baseline-requests", "0", "--gpu-cache", "4MiB"]) == 0
    found = json.loads(target.read_text())
    assert found["engine_config"]["page_tokens"] == 8
    assert found["engine_config"]["max_queue"] == 50
    assert found["loop"]["mode"] == "open"
    assert found["baseline"] is None
    assert "scores were not compared" in capsys.readouterr().out


def test_fields_of_a_preset_and_the_seed_come_from_the_file(trace: str, tmp_path: Path) -> None:
    config, target = tmp_path / "mtserve.toml", tmp_path / "r.json"
    config.write_text('[model]\nsource = "tiny"\nlayers = 1\nseed = 9\n[engine]\ndevice = "cpu"\ngpu_cache = "4MiB"\n')
    words = ["replay", trace, "--config", str(config), "--requests", "5", "--verify", "1", "--json", str(target)]
    assert main(words) == 0
    found = json.loads(target.read_text())
    assert (found["model_config"]["layers"], found["seed"], found["requests"]) == (1, 9, 5)
    assert main([*words, "--seed", "2"]) == 0
    assert json.loads(target.read_text())["seed"] == 2


def test_a_replay_under_chaos_verifies_and_says_how_many_copies_failed(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, chaos = tmp_path / "result.json", "fail=0.9,slow=0.3:2ms,seed=4"
    words = ["replay", trace, "--chaos", chaos, "--verify", "4", "--json", str(target), "--write-back-idle-ms", "0"]
    assert main([*words, *ENGINE]) == 0
    out, found = capsys.readouterr().out, json.loads(target.read_text())
    assert f"under chaos: {chaos}" in out
    assert "scores agree" in out
    assert found["chaos"] == found["engine_config"]["chaos"] == chaos
    memory = found["memory"]
    assert memory["copies_failed"] == memory["loads_failed"] + memory["stores_failed"] > 0
    (line,) = (line for line in out.splitlines() if "copies in that failed" in line)
    assert f"{memory['stores_failed']:.0f} of {memory['stores_failed'] + memory['stores']:.0f}" in line


def test_disagreement_exits_with_1_and_says_so(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement, "FLOAT32_TOLERANCE", 1e-12)
    assert main(["replay", trace, "--verify", "1", *ENGINE]) == 1
    assert "DISAGREEMENT scores differ from the uncached run by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache", "off"], "mtserve replay: cache: "),
        (["--model", "nope"], "mtserve replay: model: 'nope' is not one of tiny, "),
        (["--model", "absent.safetensors"], "mtserve replay: model: absent.safetensors is not a file"),
        (["--device", "tpu"], "mtserve replay: device: "),
        (["--concurrency", "0"], "mtserve replay: concurrency: 0 is outside 1 to 65536"),
        (["--gpu-cache", "1XB"], "mtserve replay: gpu_cache: "),
        (["--chaos", "fail=7"], "mtserve replay: chaos: fail 7 is outside 0 to 1"),
        (["--json", "no/such/folder/x.json"], "mtserve replay: json: "),
        (["--config", "absent.toml"], "mtserve replay: config: absent.toml does not exist"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(
    trace: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", trace, "--device", "cpu", *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mtserve")]
    assert len(errors) == 1
    assert errors[0].startswith(message)


def test_a_tier_without_room_exits_with_1(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", trace, "--device", "cpu", "--gpu-cache", "1KiB"]) == 1
    assert "mtserve replay: gpu_cache: 1.0 KiB holds no page" in capsys.readouterr().err
