"""Compare storage engines and segment sizes of the embedded history store.

    python benchmarks/bench_history.py [--quick] [--folder DIR] [--out FILE]

Each case opens a fresh folder with 1,000 users of 200 to 499 behaviours and 32 of 10,000, then
times reads of the long histories, appends in batches, and one-behaviour appends from threads.
Afterwards it reopens the folder and compares every user with what was appended; a difference
ends the run without a report. LMDB runs below the same store code, through an adapter here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve.errors import CorruptState
from mtserve.history import Append
from mtserve.history.embedded import SEGMENT_ROWS, EmbeddedHistory
from mtserve.history.span import Span
from mtserve.history.sqlite import PAGE_BYTES, SqliteStorage
from mtserve.history.storage import Blob, Reader, Record, Storage, Writer
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.provenance import stamp
from mtserve.types import Rows

SEED = 7
USERS, LONG_USERS, LONG_ROWS = 1000, 32, 10_000
THREADS = (1, 16, 64)
READ_LIMIT_MS, APPEND_FLOOR = 2.0, 20_000
CHOSEN = {"engine": "sqlite", "page_bytes": PAGE_BYTES, "segment_rows": SEGMENT_ROWS}
SCHEMA = FeatureSchema(
    user=(Feature("segment", buckets=100, dim=4),),
    behaviour=(
        *(Feature(name, buckets=1000, dim=4) for name in ("item", "action", "category", "shop")),
        Feature("seconds", kind="dense", width=1),
    ),
    candidate=(Feature("item", buckets=1000, dim=4),),
)


class LmdbView:
    """A transaction on LMDB, as `Reader` and `Writer`."""

    _user = struct.Struct("<5q")
    _key = struct.Struct(">IQ")
    _crc = struct.Struct("<I")

    def __init__(self, transaction: Any, tables: dict[str, Any]) -> None:
        self._transaction, self._tables = transaction, tables

    def user(self, name: bytes) -> Record | None:
        value = self._transaction.get(name, db=self._tables["users"])
        return None if value is None else self._record(value)

    def _record(self, value: bytes) -> Record:
        number, *span = self._user.unpack(value)
        return Record(number, Span(*span))

    def blobs(self, user: int, low: int, high: int) -> list[tuple[int, int, bytes]]:
        found = []
        with self._transaction.cursor(self._tables["blobs"]) as cursor:
            more = cursor.set_range(self._key.pack(user, low))
            while more and (key := self._key.unpack(cursor.key())) < (user, high):
                value = cursor.value()
                found.append((key[1], self._crc.unpack_from(value)[0], value[4:]))
                more = cursor.next()
        return found

    def users_after(self, name: bytes, limit: int) -> list[tuple[bytes, Record]]:
        found: list[tuple[bytes, Record]] = []
        with self._transaction.cursor(self._tables["users"]) as cursor:
            more = cursor.set_range(name + b"\0") if name else cursor.first()
            while more and len(found) < limit:
                found.append((cursor.key(), self._record(cursor.value())))
                more = cursor.next()
        return found

    def count(self) -> int:
        return int(self._transaction.stat(self._tables["users"])["entries"])

    def next_number(self) -> int:
        return int(self._transaction.get(b"next", b"1", db=self._tables["facts"]))

    def save_users(self, users: Iterable[tuple[bytes, Record]]) -> None:
        top = self.next_number()
        for name, record in users:
            s = record.span
            value = self._user.pack(record.number, s.first, s.position, s.floor_ms, s.last_ms)
            self._transaction.put(name, value, db=self._tables["users"])
            if record.number >= top:
                top = record.number + 1
                self._transaction.put(b"next", str(top).encode(), db=self._tables["facts"])

    def save_blobs(self, blobs: Iterable[Blob]) -> None:
        for user, number, crc, data in blobs:
            self._transaction.put(self._key.pack(user, number), self._crc.pack(crc) + data, db=self._tables["blobs"])

    def drop_blobs(self, user: int, low: int, high: int) -> None:
        for number, _, _ in self.blobs(user, low, high):
            self._transaction.delete(self._key.pack(user, number), db=self._tables["blobs"])

    def drop_user(self, name: bytes) -> None:
        self._transaction.delete(name, db=self._tables["users"])


class LmdbStorage:
    """`Storage` over LMDB with its default, full syncs."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self._env = lmdb.open(str(folder), map_size=4 << 30, max_dbs=3, max_readers=256)
        self._tables = {name: self._env.open_db(name.encode()) for name in ("facts", "users", "blobs")}

    def claim(self, facts: dict[str, str]) -> dict[str, str]:
        with self._env.begin(write=True) as transaction:
            known = transaction.get(b"facts", db=self._tables["facts"])
            if known is None:
                transaction.put(b"facts", json.dumps(facts).encode(), db=self._tables["facts"])
        return facts if known is None else dict(json.loads(known))

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        with self._env.begin() as transaction:
            yield LmdbView(transaction, self._tables)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        with self._env.begin(write=True) as transaction:
            yield LmdbView(transaction, self._tables)

    def check(self) -> None:
        with self.reading() as reader:
            if reader.count() != len(reader.users_after(b"", 1 << 30)):
                raise CorruptState("LMDB counts other users than it lists", field="history")

    def close(self) -> None:
        self._env.close()


class Load:
    """The store under test and what every user's history must be."""

    def __init__(self, folder: Path, case: dict[str, Any], scale: int) -> None:
        self.folder, self.case, self.scale = folder, case, scale
        self.random = np.random.default_rng(SEED)
        self.expected: dict[str, list[Rows]] = {}
        self.serial = 0
        self.store = self.open()
        for index in range(USERS + LONG_USERS):
            rows = self.rows(200 + index % 300 if index < USERS else LONG_ROWS)
            self.expected[f"user{index}"] = [rows]
            self.store.put_user(f"user{index}", history=rows)

    def open(self) -> EmbeddedHistory:
        storage: Storage
        if self.case["engine"] == "lmdb":
            storage = LmdbStorage(self.folder)
        else:
            storage = SqliteStorage(self.folder, page_bytes=self.case["page_bytes"])
        return EmbeddedHistory(SCHEMA, storage, segment_rows=self.case["segment_rows"])

    def rows(self, count: int) -> Rows:
        rows = np.zeros(count, SCHEMA.behaviour_dtype)
        for name in ("item", "action", "category", "shop"):
            rows[name] = self.random.integers(0, 2**62, count)
        rows["seconds"] = self.random.random((count, 1))
        rows["time_ms"] = np.arange(self.serial, self.serial + count)
        self.serial += count
        return rows

    def plan(self, count: int, size: int) -> list[Append]:
        """Appends of `size` rows to users drawn at random."""
        appends = []
        for index in self.random.integers(0, USERS, count):
            appends.append(Append(f"user{index}", self.rows(size)))
            self.expected[appends[-1].user_id].append(appends[-1].behaviours)
        return appends

    def verify(self) -> None:
        """Reopen and compare every byte; exits without a report on a difference."""
        self.store.close()
        with self.open() as store:
            store.check()
            for user_id, parts in self.expected.items():
                if store.read(user_id).behaviours.tobytes() != b"".join(part.tobytes() for part in parts):
                    sys.exit(f"{self.case}: {user_id} is not what was appended; no report")


def measure_read(load: Load) -> dict[str, float]:
    times = []
    for turn in range(6 * LONG_USERS // load.scale):
        start = time.perf_counter()
        history = load.store.read(f"user{USERS + turn % LONG_USERS}")
        times.append((time.perf_counter() - start) * 1e3)
        if len(history.behaviours) != LONG_ROWS:
            sys.exit(f"{load.case}: a read returned {len(history.behaviours)} rows; no report")
    return {"read_10k_median_ms": statistics.median(times), "read_10k_p99_ms": float(np.percentile(times, 99))}


def measure_batches(load: Load, size: int) -> float:
    """Behaviours a second through append_many of 512 appends of `size` rows, median over batches."""
    rates = []
    for _ in range(24 // load.scale):
        batch = load.plan(512, size)
        start = time.perf_counter()
        results = load.store.append_many(batch)
        rates.append(512 * size / (time.perf_counter() - start))
        if not all(isinstance(result, int) for result in results):
            sys.exit(f"{load.case}: an append was refused; no report")
    return statistics.median(rates)


def run_threads(load: Load, threads: int, count: int) -> tuple[float, list[float], int]:
    """One-behaviour appends from threads that own their users: seconds, latencies in s, commits."""
    parts: list[list[Append]] = [[] for _ in range(threads)]
    for append in load.plan(count, 1):
        parts[int(append.user_id[4:]) % threads].append(append)
    latencies: list[list[float]] = [[] for _ in range(threads)]

    def work(part: list[Append], out: list[float]) -> None:
        for append in part:
            start = time.perf_counter()
            load.store.append(append.user_id, append.behaviours)
            out.append(time.perf_counter() - start)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(parts, latencies, strict=True)]
    before, start = load.store.commits, time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start, [value for part in latencies for value in part], load.store.commits - before


def measure_threads(load: Load, threads: int) -> dict[str, float]:
    count = 4096 // load.scale
    runs = [run_threads(load, threads, count) for _ in range(3)]
    latencies = [value * 1e3 for _, part, _ in runs for value in part]
    return {
        "behaviours_per_s": statistics.median(count / seconds for seconds, _, _ in runs),
        "append_median_ms": statistics.median(latencies),
        "append_p99_ms": float(np.percentile(latencies, 99)),
        "commits_per_1000_appends": statistics.median(1000 * commits / count for _, _, commits in runs),
    }


def measure(case: dict[str, Any], folder: Path, scale: int) -> dict[str, Any]:
    load = Load(folder, case, scale)
    result: dict[str, Any] = dict(case)
    result |= measure_read(load)
    result["batched_1_row_behaviours_per_s"] = measure_batches(load, 1)
    result["batched_16_rows_behaviours_per_s"] = measure_batches(load, 16)
    result["threads"] = {str(threads): measure_threads(load, threads) for threads in THREADS}
    load.verify()
    result["disk_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    return result


def count_syncs(case: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """fsync and fdatasync calls of 1,024 appends from each thread count, counted by strace; None without it."""
    if shutil.which("strace") is None:
        return None
    counts = {}
    for threads in (0, *THREADS):  # 0: setting up alone, which is taken off the others
        target = folder / str(threads)
        target.mkdir()
        trace = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(target / "trace")]
        child = [sys.executable, __file__, "--child", json.dumps({"case": case, "threads": threads})]
        done = subprocess.run([*trace, *child, "--folder", str(target)], capture_output=True, text=True)
        if done.returncode:
            return None
        counts[threads] = sum("sync(" in line for line in (target / "trace").read_text().splitlines())
    return {str(threads): counts[threads] - counts[0] for threads in THREADS}


def run_child(work: dict[str, Any], folder: str) -> None:
    store_folder = Path(folder) / "store"
    store_folder.mkdir()
    load = Load(store_folder, work["case"], 1)
    if work["threads"]:
        run_threads(load, work["threads"], 1024)
    os._exit(0)  # closing would sync once more


def raw_sync_ms(folder: Path) -> float:
    """Median of writing 8 KiB and fdatasync: what the disk itself asks for durability."""
    times = []
    with open(folder / "raw", "wb", buffering=0) as file:
        for _ in range(200):
            start = time.perf_counter()
            file.write(b"x" * 8192)
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def cases(quick: bool) -> list[dict[str, Any]]:
    sizes = sorted({SEGMENT_ROWS} if quick else {SEGMENT_ROWS, 32, 64, 128, 256, 512})
    found = [{**CHOSEN, "segment_rows": size} for size in sizes]
    if not quick:
        found += [{**CHOSEN, "page_bytes": size} for size in (8192, 16384)]
    try:
        import lmdb  # noqa: F401
    except ImportError:
        print("lmdb is not installed; SQLite runs alone")
        return found
    return found + [{"engine": "lmdb", "page_bytes": 4096, "segment_rows": size} for size in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument("--folder", default=None, help="where to put the stores (default: the temporary folder)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "history.json"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child, args.folder)
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        sync_ms = raw_sync_ms(Path(root))
        for index, case in enumerate(cases(args.quick)):
            folder = Path(root) / str(index)
            folder.mkdir()
            results.append(measure(case, folder, 4 if args.quick else 1))
            print(json.dumps(results[-1]))
            shutil.rmtree(folder)
        (Path(root) / "syncs").mkdir()
        syncs = count_syncs(CHOSEN, Path(root) / "syncs")
    best = next(result for result in results if all(result[key] == value for key, value in CHOSEN.items()))
    report = {
        "provenance": stamp(seed=SEED),
        "row_bytes": SCHEMA.behaviour_dtype.itemsize,
        "raw_8k_fdatasync_median_ms": sync_ms,
        "chosen": CHOSEN,
        "chosen_meets_read_limit": best["read_10k_median_ms"] <= READ_LIMIT_MS,
        "chosen_meets_append_floor": best["batched_1_row_behaviours_per_s"] >= APPEND_FLOOR,
        "chosen_syncs_of_1024_appends_by_threads": syncs,
        "cases": results,
    }
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.out}; syncs {syncs}; fdatasync {sync_ms:.2f} ms")


if __name__ == "__main__":
    main()
