"""The GPU's own check: the tests marked `gpu`, the kernel and forward benchmarks, then replays in bf16.

    make gpu-check                      needs a CUDA device and the packages of the interpreter it runs in
    python benchmarks/gpu_check.py --out DIR --users 200 --requests 2000

Fails when a test fails, when not a single GPU test ran, when a benchmark's correctness check fails, when a replay's scores
break the exactness contract; and, once it has written what it measured, when a replay was held against no fp32 recompute,
when too many of the rows that the generated trace's replay computed were padding, or when too little was found of users who
come back all the time. Writes gpu_check.json and NAME.json for each benchmark of --benchmarks. The EB-NeRD replay needs
its trace and says so where it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench_replay import ROOT, SHARES, ebnerd_trace, replay, table

from mtserve.provenance import stamp

BENCHMARKS = ("attention", "product", "forward", "loop", "transfer", "restore")
DRAWN = ("restore",)  # into a PNG beside the JSON
GENERATED = "generated 25%ws"
RETURNING = "returning 10%ws load"
RETURNING_HIT_RATIO = 0.985  # least share of prefix tokens found in either tier where users always come back
PADDED_ROWS_LIMIT = 0.15  # of the rows that a replay computes
RETURNING_USERS = 40  # of whom the device holds 4 at a time
# With the host tier off; smaller than the device's; with half of the working set; with all of it.
RETURNING_SETTINGS = {
    RETURNING: ("--host-cache", "100%ws", "--restore", "load"),
    "returning 10%ws, host 100%ws": ("--host-cache", "100%ws"),
    "returning 10%ws, host 50%ws": ("--host-cache", "50%ws"),
    "returning 10%ws, host 5%ws": ("--host-cache", "5%ws"),
    "returning 10%ws, no host": ("--host-cache", "0"),
}
RESTORING_USERS = 160  # of whom the device holds 16
RESTORING_SETTINGS = {
    "restoring 10%ws": (),
    "restoring 10%ws load": ("--restore", "load"),
    "restoring 10%ws x8": ("--host-format", "x8"),
    "restoring 10%ws x8 load": ("--host-format", "x8", "--restore", "load"),
    "restoring 10%ws x4": ("--host-format", "x4"),
}
# Requests of each replay that are recomputed in fp32, which takes a CPU seconds where they are long. Of few users all
# are long.
VERIFIED = ("--verify", "10", "--verify-tokens", "2048")
LONG_VERIFIED = ("--verify", "4", "--verify-tokens", "4096")
# Seconds after which a test says where it hangs, and after which its whole process is ended.
HANGS_S, TESTS_S = 60, 420


def first_device(number: int, devices: int) -> dict[str, str]:
    """The environment in which device `number` comes first, and the others behind it."""
    order = [str((number + place) % devices) for place in range(devices)]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(order)}


def run_tests(processes: int, devices: int) -> dict[str, int]:
    """Counts of the tests marked gpu, by so many processes at once; exits when one failed or none ran."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    shares = [share for number in range(processes) if (share := files[number::processes])]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(shares)) as pool:

        def run(number: int) -> dict[str, int]:
            return run_share(shares[number], Path(folder) / f"{number}.xml", first_device(number, devices))

        found = list(pool.map(run, range(len(shares))))
    counts = {key: sum(each[key] for each in found) for key in found[0]}
    if counts["status"] or counts["passed"] == 0:
        sys.exit(f"GPU tests: {counts}; at least one must run and none may fail")
    del counts["status"]
    return counts


def run_share(files: Sequence[Path], report: Path, environment: dict[str, str]) -> dict[str, int]:
    """Counts of the tests of these files; `status`: what pytest said, 0 where none failed."""
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "--durations", "12", "-o", f"faulthandler_timeout={HANGS_S}",
        f"--junitxml={report}", *map(str, files)
    ]  # fmt: skip
    run = partial(subprocess.run, command, cwd=ROOT, check=False, env=environment, text=True, capture_output=True)
    try:
        done = run(timeout=TESTS_S)
    except subprocess.TimeoutExpired as late:
        for said in (late.stdout, late.stderr):
            print(said.decode(errors="replace") if isinstance(said, bytes) else said or "", flush=True)
        sys.exit(f"GPU tests: {', '.join(path.name for path in files)} were not over after {TESTS_S} s")
    print(done.stdout, done.stderr, flush=True)
    if not report.exists():
        sys.exit(f"pytest ended with status {done.returncode} before it reported")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "passed": passed, "status": done.returncode}


def run_benchmark(name: str, out: Path) -> None:
    """Run benchmarks/bench_NAME.py into `out`; exits when its correctness check fails."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--out", str(out / f"{name}.json")]
    if name in DRAWN:
        command += ["--plot", str(out / f"{name}.png")]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status != 0:
        sys.exit(f"bench_{name} failed with status {status}")


def generated_trace(path: Path, users: int, requests: int, seed: int) -> Path:
    """A calibrated-synthetic trace, written to `path`."""
    size = ["--users", str(users), "--requests", str(requests), "--seed", str(seed), "--out", str(path)]
    subprocess.run([sys.executable, "-m", "mtserve", "trace", "generate", *size], cwd=ROOT, check=True)
    return path


def run_replays(options: argparse.Namespace, devices: int) -> dict[str, dict[str, Any]]:
    """The EB-NeRD sweep where its trace is here, and the generated traces, one at a time on each device; exits when
    scores disagree.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(devices) as pool:
        wanted = replay_words(options, Path(folder))
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for device in range(devices):
            free.put(device)

        def run(words: list[str]) -> dict[str, Any]:
            device = free.get()
            try:
                return replay(Path(words[0]), *words[1:], environment=first_device(device, devices))
            finally:
                free.put(device)

        return dict(zip(wanted, pool.map(run, wanted.values()), strict=True))


def replay_words(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Of each replay its trace and flags."""
    common = ["--device", "cuda", "--model", "hstu-512", "--seed", str(options.seed)]
    ten, whole = ("--gpu-cache", "10%ws"), ("--host-cache", "100%ws")
    words: dict[str, list[str]] = {}
    real = ebnerd_trace()
    if real is None:
        print("the EB-NeRD trace is not here: its replays are left out")
    else:
        for share in SHARES:
            flags = [*common, "--gpu-cache", share, *whole, "--verify", "40"]
            words[f"ebnerd {share}"] = [str(real), *flags]

    def add(
        settings: dict[str, tuple[str, ...]],
        users: int,
        requests: int,
        baseline: int,
        verified: tuple[str, ...] = VERIFIED,
    ) -> None:
        path = generated_trace(folder / f"{users}.jsonl.gz", users, requests, options.seed)
        for name, flags in settings.items():
            words[name] = [str(path), *common, *flags, "--baseline-requests", str(baseline), *verified]

    add({GENERATED: ("--gpu-cache", "25%ws", *whole)}, options.users, options.requests, 400)
    returning = {name: (*ten, *each) for name, each in RETURNING_SETTINGS.items()}
    add(returning, RETURNING_USERS, 2 * options.requests, 300, LONG_VERIFIED)
    restoring = {name: (*ten, *whole, *each) for name, each in RESTORING_SETTINGS.items()}
    add(restoring, RESTORING_USERS, 2 * options.requests, 600)
    return words


def check_verified(replays: dict[str, dict[str, Any]]) -> None:
    """Exits unless some requests of each replay were held against fp32."""
    unseen = [name for name, result in replays.items() if not result["agreement"]["verified"]["requests"]]
    if unseen:
        sys.exit(f"no request was recomputed in fp32 of {', '.join(unseen)}")


def check_returning(result: dict[str, Any]) -> None:
    """Exits unless nearly all of what was encoded once was found again."""
    found = result["hit_ratio"]["token"]["total"]
    if not found > RETURNING_HIT_RATIO:
        sys.exit(f"{RETURNING}: {found:.2%} of the prefix tokens were found; must be above {RETURNING_HIT_RATIO:.1%}")


def check_padding(result: dict[str, Any]) -> None:
    """Exits unless the replay ran on graphs and wasted fewer rows than the limit."""
    share = result["padded_rows_share"]
    if share is None:
        sys.exit("generated trace: the replay did not run on the cuda kernels, so that nothing is known of its padding")
    if not share < PADDED_ROWS_LIMIT:
        sys.exit(
            f"generated trace: {share:.1%} of the rows computed were padding; must be under {PADDED_ROWS_LIMIT:.0%}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    parser.add_argument("--users", type=int, default=200, help="users of the generated trace")
    parser.add_argument("--requests", type=int, default=2000, help="requests of the generated trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--benchmarks", nargs="*", choices=BENCHMARKS, default=BENCHMARKS, help="which to run besides tests and replays"
    )
    parser.add_argument("--test-processes", type=int, default=1, help="processes that run the tests, in turn a device")
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; this check is for a machine that has one")
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "stamp": stamp(seed=options.seed, device="cuda:0"),
    }
    devices = torch.cuda.device_count()
    result["tests"] = run_tests(max(1, options.test_processes), devices)
    for name in options.benchmarks:
        run_benchmark(name, options.out)
    result["replays"] = run_replays(options, devices)
    print(table(result["replays"]))
    target = options.out / "gpu_check.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    check_verified(result["replays"])
    check_padding(result["replays"][GENERATED])
    check_returning(result["replays"][RETURNING])
    print(f"GPU tests passed: {result['tests']['passed']}; wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
