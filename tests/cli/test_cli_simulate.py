from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtserve.cli import main
from mtserve.model.presets import preset
from mtserve.restore.cache import CostCache, CostKey
from mtserve.restore.costs import Costs
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.io import read_trace, write_trace
from mtserve.trace.simulate.demand import Demand, demand_of

Capture = pytest.CaptureFixture[str]
ONLINE = ("lru", "s3fifo", "sieve", "wtinylfu", "arc", "gdsf", "locality")
SHARES = ("2%", "5%", "10%ws", "25%", "60%", "120%")
USER_TOKENS = 3
PAGE = 64


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trace") / "two-hundred.jsonl.gz"
    write_trace(generate(GeneratorConfig(users=200, requests=3000, candidates_mean=4.0)), path)
    return str(path)


def _cells(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    target = tmp_path / "cells.json"
    assert main(["simulate", *words, "--json", str(target)]) == 0
    found: list[dict[str, Any]] = json.loads(target.read_text())
    return found


def _demand(trace: str) -> Demand:
    return demand_of(read_trace(trace), preset("hstu-512"), USER_TOKENS)


def _plain_lru(demand: Demand, pages: int) -> tuple[float, float]:
    """(token hit ratio, request hit ratio) of one tier: a list of users, tails evicted first; histories only grow."""
    order: list[int] = []
    held: dict[int, int] = {}
    tokens = requests = 0
    for user, wanted in zip(demand.user.tolist(), demand.tokens.tolist(), strict=True):
        found = held.get(user, 0)
        tokens += found
        requests += found > 0
        if user in held:
            order.remove(user)
        order.append(user)
        held[user] = wanted
        over = sum(-(-each // PAGE) for each in held.values()) - pages
        for victim in [other for other in order if over > 0 and held[other]]:
            has = -(-held[victim] // PAGE)
            taken = max(0, min(over, has))
            over -= taken
            held[victim] = min(held[victim], (has - taken) * PAGE)
    return tokens / int(demand.tokens.sum()), requests / demand.requests


def test_lru_without_a_host_tier_equals_a_plain_lru(trace: str, tmp_path: Path) -> None:
    short = ["--history-max", "2000", "--generate", "--users", "200", "--requests", "1500", "--candidates-mean", "3"]
    cells = _cells(tmp_path, *short, "--gpu-cache", ",".join(SHARES), "--host-cache", "0", "--no-curves")
    config = GeneratorConfig(users=200, requests=1500, candidates_mean=3.0, history_max=2000)
    demand = demand_of(generate(config), preset("hstu-512"), USER_TOKENS)
    assert (demand.generation == demand.generation_after).all()
    assert [cell["gpu_cache"] for cell in cells] == list(SHARES)
    for cell in cells:
        ratio = cell["hit_ratio"]
        assert (ratio["token"]["gpu"], ratio["request"]["gpu"]) == pytest.approx(
            _plain_lru(demand, cell["gpu_bytes"] >> 20), abs=1e-12
        )
        assert ratio["token"]["host"] == ratio["request"]["host"] == 0
        assert ratio["token"]["total"] == ratio["token"]["gpu"]


def test_every_policy_stays_below_the_optimum_and_lru_rises_with_memory(trace: str, tmp_path: Path) -> None:
    sizes = ["--gpu-cache", ",".join(SHARES), "--host-cache", "0,20%,100%", "--no-curves"]
    cells = _cells(tmp_path, trace, "--policy", ",".join(ONLINE), *sizes)
    assert len(cells) == len(ONLINE) * len(SHARES) * 3
    for cell in cells:
        assert 0 < cell["hit_ratio"]["token"]["total"] <= cell["optimum_token_hit_ratio"] + 1e-12
    for host in ("0", "20%", "100%"):
        totals = [
            cell["hit_ratio"]["token"]["total"]
            for cell in cells
            if cell["policy"] == "lru" and cell["host_cache"] == host
        ]
        assert len(totals) == len(SHARES)
        assert (np.diff(totals) >= -1e-12).all()


def test_policies_that_know_what_comes_beat_those_that_do_not(trace: str, tmp_path: Path) -> None:
    words = ("--policy", ",".join((*ONLINE, "gap-oracle", "belady")), "--gpu-cache", "2%,10%", "--host-cache", "0")
    cells = _cells(tmp_path, trace, *words, "--no-curves")
    for size in ("2%", "10%"):
        found = {cell["policy"]: cell["hit_ratio"]["token"]["total"] for cell in cells if cell["gpu_cache"] == size}
        assert found["belady"] >= max(found[policy] for policy in ONLINE)
        assert found["gap-oracle"] > 0


def test_cells_have_what_the_documentation_says(trace: str, tmp_path: Path) -> None:
    (cell,) = _cells(tmp_path, trace, "--gpu-cache", "256MiB", "--host-cache", "50%", "--no-curves")
    demand = _demand(trace)
    assert cell.keys() == {
        "policy", "gpu_cache", "host_cache", "gpu_bytes", "host_bytes", "gpu_users", "hit_ratio", "hit_ratio_after_first",
        "hit_ratio_by_pin", "optimum_token_hit_ratio", "loaded_bytes", "stored_bytes", "evicted_pages", "pinned_pages",
        "predicted", "trace", "calibrated-synthetic", "model", "requests", "working_set_bytes", "machine", "gpu_format",
        "host_format", "pins", "commit",
    }  # fmt: skip
    assert (cell["policy"], cell["gpu_cache"], cell["host_cache"]) == ("lru", "256MiB", "50%")
    assert cell["gpu_bytes"] == 256 << 20
    assert cell["working_set_bytes"] == demand.working_set_pages(PAGE) << 20
    assert cell["host_bytes"] == -(-demand.working_set_pages(PAGE) // 2) << 20
    assert cell["gpu_users"] == pytest.approx(256 * PAGE / demand.tokens.mean())
    for ratios in (cell["hit_ratio"], cell["hit_ratio_after_first"]):
        assert ratios["request"].keys() == ratios["token"].keys() == {"gpu", "host", "total"}
        assert ratios["token"]["host"] > 0
    assert cell["hit_ratio_after_first"]["token"]["total"] > cell["hit_ratio"]["token"]["total"]
    assert cell["loaded_bytes"] > 0 and cell["stored_bytes"] > 0 and cell["loaded_bytes"] % (1 << 20) == 0
    assert cell["evicted_pages"]["gpu"] > 0
    assert cell["predicted"].keys() == {"requests_per_s", "p50_ms", "p99_ms"}
    assert 0 < cell["predicted"]["p50_ms"] <= cell["predicted"]["p99_ms"]
    assert cell["machine"] == "NVIDIA H200" and cell["calibrated-synthetic"] is True
    assert (cell["gpu_format"], cell["host_format"]) == ("native", "kv")
    assert cell["pins"] is cell["hit_ratio_by_pin"] is None and cell["pinned_pages"] == {"gpu": 0, "host": 0}


def test_any_number_of_jobs_gives_the_same(trace: str, tmp_path: Path, capsys: Capture) -> None:
    words = (trace, "--policy", "gdsf,lru,arc", "--gpu-cache", "5%,20%", "--sample-rate", "0.4")
    found, told = [], []
    for jobs in ("1", "5"):
        folder = tmp_path / jobs
        folder.mkdir()
        found.append(_cells(folder, *words, "--jobs", jobs))
        told.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert told[0] == told[1]


def test_tables_tell_of_hits_forecast_and_targets(trace: str, capsys: Capture) -> None:
    assert main(["simulate", trace, "--policy", "lru,sieve", "--gpu-cache", "5%,1GiB", "--sample-rate", "0.5"]) == 0
    out, err = capsys.readouterr()
    asking = len(np.unique(_demand(trace).user))
    for words in (
        "synthetic (calibrated-synthetic): 3,000 requests", f"{asking} users who ask", "hstu-512: working set ",
        "Predicted for NVIDIA H200", "Memory for a token hit ratio", "sampled users with ", "LRU's curve is off by ",
    ):  # fmt: skip
        assert words in out
    assert "requests simulated: 24,000" in err
    assert "miss-ratio curves: " in err
    rows = [line for line in out.splitlines() if "│ sieve" in line]
    assert len(rows) == 2 * 4 + 1
    (target,) = (line for line in out.partition("Memory for")[2].splitlines() if "│ optimum" in line)
    assert "iB" in target


def test_packed_pages_leave_less_room_on_the_gpu_and_more_on_the_host(trace: str, tmp_path: Path) -> None:
    words = (trace, "--gpu-cache", "512MiB", "--host-cache", "0,1GiB", "--no-curves")
    plain, packed = (_cells(tmp_path, *words, "--host-format", each) for each in ("kv", "x8"))
    assert plain[0]["hit_ratio"] == packed[0]["hit_ratio"]  # without a host tier there is nothing to pack
    assert packed[1]["hit_ratio"]["token"]["gpu"] < plain[1]["hit_ratio"]["token"]["gpu"]
    assert packed[1]["hit_ratio"]["token"]["total"] > plain[1]["hit_ratio"]["token"]["total"]


def test_a_byte_a_value_is_twice_as_much_memory_at_half_the_bytes(trace: str, tmp_path: Path) -> None:
    """And no batch is foretold to be faster for what it finds in the same pages."""
    native = _cells(tmp_path, trace, "--gpu-cache", "1GiB", "--host-cache", "0,2GiB", "--no-curves")
    words = (trace, "--gpu-format", "fp8", "--no-curves")
    fp8 = _cells(tmp_path, *words, "--gpu-cache", "512MiB", "--host-cache", "0,1GiB")
    for wide, narrow in zip(native, fp8, strict=True):
        assert narrow["gpu_format"] == "fp8"
        assert narrow["hit_ratio"] == wide["hit_ratio"]
        for name in ("working_set_bytes", "gpu_bytes", "host_bytes", "loaded_bytes", "stored_bytes"):
            assert 2 * narrow[name] == wide[name]
    assert fp8[0]["predicted"]["p50_ms"] > native[0]["predicted"]["p50_ms"]
    assert main(["simulate", trace, "--gpu-format", "fp8", "--host-format", "x8"]) == 2


def _pins(tmp_path: Path, trace: str, share: float) -> tuple[Path, int]:
    """A file of the users who ask first, and how many these are."""
    columns = read_trace(trace)
    numbers = list(dict.fromkeys(columns.user.tolist()))
    named = [columns.user_ids[number] for number in numbers[: int(share * len(numbers))]]
    path = tmp_path / "campaign.txt"
    path.write_text("\n".join([*named, named[0], "nobody", "no other"]) + "\n")
    return path, len(named)


def test_pinned_users_find_more_and_others_less(trace: str, tmp_path: Path, capsys: Capture) -> None:
    pins, users = _pins(tmp_path, trace, 0.05)
    words = (trace, "--gpu-cache", "5%", "--host-cache", "0,20%", "--no-curves")
    pinned = _cells(tmp_path, *words, "--pin", str(pins), "--pin-budget", "0.5")
    out, err = capsys.readouterr()
    assert f"pinned: {users + 2} users, 2 of them unknown to the trace; {users} ask and have states of " in out
    assert "they may keep 50%" in out and "pinned: GPU/host/all" in out
    assert "reading pinned users: " in err
    # A budget of nothing gives the ratios of the same users unpinned.
    unpinned = _cells(tmp_path, *words, "--pin", str(pins), "--pin-budget", "0")
    plain = _cells(tmp_path, *words)
    for kept, free, without in zip(pinned, unpinned, plain, strict=True):
        assert kept["pins"].keys() == {"named", "asking", "unknown", "working_set_bytes", "budget"}
        assert (kept["pins"]["named"], kept["pins"]["asking"], kept["pins"]["unknown"]) == (users + 2, users, 2)
        assert 0 < kept["pins"]["working_set_bytes"] < kept["working_set_bytes"]
        ratios = [each["hit_ratio_by_pin"] for each in (kept, free)]
        assert ratios[0]["pinned"]["token"]["gpu"] > ratios[1]["pinned"]["token"]["gpu"]
        assert ratios[0]["others"]["token"]["gpu"] < ratios[1]["others"]["token"]["gpu"]
        assert 0 < kept["pinned_pages"]["gpu"] <= 0.5 * kept["gpu_bytes"] / (1 << 20)
        assert free["hit_ratio"] == without["hit_ratio"]


def test_curves_of_pinned_users_are_simulated(trace: str, tmp_path: Path) -> None:
    pins, _ = _pins(tmp_path, trace, 0.3)
    found = []
    for words in ((), ("--pin", str(pins), "--pin-budget", "0"), ("--pin", str(pins), "--pin-budget", "0.5")):
        folder = tmp_path / f"plots {len(found)}"
        pytest.importorskip("matplotlib")
        assert main(["simulate", trace, "--gpu-cache", "5%", "--report", str(folder), *words]) == 0
        curve = json.loads((folder / "curves.json").read_text())["curves"][0]
        found.append((np.array(curve["bytes"]), np.array(curve["token_hit_ratio"])))
    one_pass, unpinned, pinned = found
    assert len(unpinned[0]) == len(pinned[0]) == 16 < len(one_pass[0])
    np.testing.assert_allclose(unpinned[1], np.interp(unpinned[0], *one_pass), atol=5e-3)
    assert (unpinned[1] - pinned[1]).max() > 2e-3
    assert pinned[1][-1] == unpinned[1][-1]


def test_plots_and_curves_are_written(trace: str, tmp_path: Path, capsys: Capture) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    folder = tmp_path / "plots"
    assert main(["simulate", trace, "--policy", "lru,s3fifo", "--report", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"curves.json", "hit_ratio.png", "memory.png", "miss_ratio.png"}
    out = capsys.readouterr().out
    for path in folder.glob("*.png"):
        assert str(path) in out
        pixels = pyplot.imread(path)[..., :3]
        assert (pixels.min(axis=-1) < 0.5).mean() > 0.002  # ink
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    curves = json.loads((folder / "curves.json").read_text())
    assert [curve["policy"] for curve in curves["curves"]] == ["lru", "s3fifo", "optimum"]
    lru, _, best = curves["curves"]
    assert len(lru["bytes"]) == len(lru["token_hit_ratio"]) > 100
    assert lru["token_hit_ratio"][-1] == pytest.approx(best["token_hit_ratio"][-1])
    assert curves["sampled_share_of_pages"] == 1.0
    for target, size in lru["bytes_for_after_first"].items():
        assert (size is None) == (float(target) > lru["best_after_first"])
        assert size is None or best["bytes_for_after_first"][target] <= size


def test_costs_come_from_an_engines_file(trace: str, tmp_path: Path) -> None:
    path, model = tmp_path / "costs.json", preset("hstu-512")
    slow = Costs(link=((1, 1e9), (2, 1e9)), load_s=0.0, batch_s=0.5, layer_s=0.0, row_s=0.0, pair_s=0.0, unpack_s=0.0)
    key = CostKey(
        gpu="one", software="", kernels="", layers=model.layers, d=model.d, heads=model.heads, head_dim=model.head_dim,
        dtype="bfloat16", page_tokens=64, format="kv", batches="", link_bytes=1,
    )  # fmt: skip
    CostCache(path).put(key, slow)
    words = (trace, "--gpu-cache", "10%", "--host-cache", "0", "--no-curves", "--costs", str(path))
    (cell,) = _cells(tmp_path, *words)
    assert cell["predicted"]["p50_ms"] == pytest.approx(500.0)
    assert cell["machine"] == "measured costs"
    assert main(["simulate", *words, "--gpu-format", "fp8"]) == 2
    CostCache(path).put(replace(key, format="kv of fp8"), slow)
    assert _cells(tmp_path, *words, "--gpu-format", "fp8")[0]["predicted"]["p50_ms"] == pytest.approx(500.0)
    assert main(["simulate", *words, "--model", "hstu-1024"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "lru,fifo"], "policy: 'fifo' is not one of lru, s3fifo, "),
        (["--policy", "lru,lru"], "policy: 'lru' is named twice"),
        (["--gpu-cache", "5%,,10%"], "gpu_cache: '5%,,10%' has an empty value"),
        (["--gpu-cache", "0"], "gpu_cache: the GPU tier needs a page"),
        (["--gpu-cache", "1KiB"], "gpu_cache: '1KiB' holds no page"),
        (["--host-cache", "lots"], "host_cache: 'lots' is not a capacity"),
        (["--gpu", "tpu"], "gpu: 'tpu' is not one of h200"),
        (["--jobs", "-1"], "jobs: -1 is outside 0 to 1024"),
        (["--sample-rate", "2"], "sample_rate: 2.0 is outside 0.0 to 1.0"),
        (["--model", "nope"], "model: 'nope' is not one of tiny, "),
        (["--dtype", "float32"], "dtype: figures of GPUs are for states of 16 bits"),
        (["--costs", "absent.json"], "costs: absent.json is not a file"),
        (["--json", "no/such/folder/x.json"], "json: "),
        (["--pin-budget", "0.2"], "pin_budget: is for --pin"),
        (["--pin", "absent.txt"], "path: absent.txt is not a file"),
        (["--pin", "/dev/null"], "path: /dev/null is not a file"),
        (["--gpu-format", "int8"], "gpu_format: 'int8' is not one of native, fp8"),
        (["--users", "5"], "users: is for --generate"),
        (["--generate"], "generate: takes no trace file"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(trace: str, words: list[str], message: str, capsys: Capture) -> None:
    assert main(["simulate", trace, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mtserve")]
    assert len(errors) == 1
    assert errors[0].startswith(f"mtserve simulate: {message}")


def test_a_tier_far_beyond_need_takes_no_memory_for_it(tmp_path: Path) -> None:
    words = ("--generate", "--users", "20", "--requests", "100", "--policy", "wtinylfu,s3fifo", "--no-curves")
    cells = _cells(tmp_path, *words, "--gpu-cache", "120%,900TiB", "--host-cache", "0,900TiB")
    assert len({json.dumps(cell["hit_ratio"]["token"]["total"]) for cell in cells}) == 1
    assert cells[-1]["gpu_bytes"] == cells[-1]["host_bytes"] == 900 << 40


def test_help_brings_neither_torch_nor_plots() -> None:
    code = "import sys; from mtserve.cli import main; main(['simulate', '--help'])"
    command = [sys.executable, "-c", code + "; print('heavy', {'torch', 'matplotlib', 'rich'} & set(sys.modules))"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "mtserve simulate --generate --users 5000" in found.stdout
    assert found.stdout.endswith("heavy set()\n")


def test_a_trace_is_needed_and_has_to_be_there(capsys: Capture) -> None:
    assert main(["simulate"]) == 2
    assert "mtserve simulate: trace: name a trace file, or give --generate" in capsys.readouterr().err
    assert main(["simulate", "absent.parquet"]) == 2
    assert "absent.parquet is not a file" in capsys.readouterr().err
    assert main(["simulate", "--generate", "--requests", "0"]) == 2
    assert "mtserve simulate: trace: the trace has no request" in capsys.readouterr().err
