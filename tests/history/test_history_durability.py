"""Kill -9, second openers, other formats, and bytes that rotted."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from history_rows import SCHEMA, embedded, features, rows

from mtserve.config import HistoryConfig
from mtserve.errors import CorruptState, FailedPrecondition
from mtserve.history import open_history
from mtserve.history.sqlite import SqliteStorage

CHILD = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from history_rows import embedded, rows
store = embedded(Path(sys.argv[1]))
def work(name):
    position = store.append(name, rows(0))
    while True:
        position = store.append(name, rows(position, position), position)
        print(f"{name} {position}\\n", end="", flush=True)
for number in range(4):
    threading.Thread(target=work, args=(f"u{number}",)).start()
"""


def test_kill_loses_no_acknowledged_append(tmp_path: Path) -> None:
    for turn in range(2):
        folder, log = tmp_path / str(turn), tmp_path / f"{turn}.log"
        with log.open("wb") as out:
            child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)], stdout=out)
            wait_for(lambda log=log, size=4000 + 1111 * turn: log.stat().st_size > size)
            child.send_signal(signal.SIGKILL)
            child.wait()
        acknowledged: dict[str, int] = {}
        for line in log.read_text().splitlines()[:-1]:
            name, position = line.split()
            acknowledged[name] = max(acknowledged.get(name, 0), int(position))
        assert len(acknowledged) == 4
        with embedded(folder) as store:
            store.check()
            for name, position in acknowledged.items():
                found = store.read(name)
                assert position <= found.position <= position + 2 * 2  # at most the append under way and an unseen line
                assert found.position % 2 == 1  # appends went in whole
                assert found.behaviours["time_ms"].tolist() == [0, *(n - n % 2 + 1 for n in range(found.position - 1))]


def wait_for(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the child did not get there"
        time.sleep(0.01)


def test_commits_are_synced(tmp_path: Path) -> None:
    storage = SqliteStorage(tmp_path)
    assert storage._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert storage._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    storage.close()


def test_one_process_owns_the_folder(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from history_rows import embedded; embedded(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    with embedded(tmp_path) as store:
        store.append("a", rows(1))
        second = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert second.returncode == 1
        assert "FailedPrecondition: path:" in second.stderr
        assert "is open in another" in second.stderr
        with pytest.raises(FailedPrecondition, match="open in another"):
            embedded(tmp_path)
        assert store.append("a", rows(2)) == 2
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 0


def test_segment_size_is_the_folders_own(tmp_path: Path) -> None:
    with embedded(tmp_path, segment_rows=3) as store:
        store.append("a", rows(*range(10)))
    with embedded(tmp_path, segment_rows=64) as store:
        assert store.append("a", rows(*range(10, 20))) == 20
        assert store.read("a").behaviours["time_ms"].tolist() == list(range(20))
        store.check()


def change(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "history.sqlite")
    for statement in statements:
        assert connection.execute(statement).rowcount > 0
    connection.commit()
    connection.close()


def test_another_format_is_refused(tmp_path: Path) -> None:
    embedded(tmp_path).close()
    change(tmp_path, "UPDATE facts SET value = '2' WHERE name = 'format'")
    with pytest.raises(FailedPrecondition, match="format 2; this version reads 1"):
        open_history(HistoryConfig(path=str(tmp_path)), SCHEMA)


SECOND = (1 << 32) + 2  # user 1's second segment
DAMAGE = {
    "flipped byte": f"UPDATE blobs SET bytes = CAST(X'FF' || substr(bytes, 2) AS BLOB) WHERE key = {SECOND}",
    "other type": f"UPDATE blobs SET bytes = X'FF' || substr(bytes, 2) WHERE key = {SECOND}",
    "cut short": f"UPDATE blobs SET bytes = substr(bytes, 1, 21) WHERE key = {SECOND}",
    "missing": f"DELETE FROM blobs WHERE key = {SECOND}",
    "another's": "UPDATE blobs SET (crc, bytes) = (SELECT crc, bytes FROM blobs WHERE key = (2 << 32) + 2) "
    f"WHERE key = {SECOND}",
    "position": "UPDATE users SET position = position + 1 WHERE number = 1",
    "features": f"UPDATE blobs SET bytes = zeroblob(20) WHERE key = {1 << 32}",
}
UNREAD_DAMAGE = {
    "last time": "UPDATE users SET last_ms = last_ms + 1 WHERE number = 1",
    "left over": f"INSERT INTO blobs SELECT {SECOND + 7}, crc, bytes FROM blobs WHERE key = {SECOND}",
    "orphan": f"INSERT INTO blobs SELECT (9 << 32) + 1, crc, bytes FROM blobs WHERE key = {SECOND}",
}


def fill(folder: Path) -> None:
    with embedded(folder) as store:
        store.put_user("a", features(1), rows(*range(10)))
        store.put_user("b", features(2), rows(*range(5, 15)))
        store.check()


def test_a_damaged_segment_size_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    change(tmp_path, "UPDATE facts SET value = '0' WHERE name = 'segment_rows'")
    with pytest.raises(CorruptState, match="segments of '0' rows"):
        embedded(tmp_path)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_by_read_and_check(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    change(tmp_path, DAMAGE[name])
    with embedded(tmp_path) as store:
        with pytest.raises(CorruptState, match="'a'"):
            store.read("a")
        with pytest.raises(CorruptState):
            store.check()
        assert store.read("b").position == 10
        assert store.delete("a")
        assert store.put_user("a", None, rows(1, 2)) == 2
        store.check()


@pytest.mark.parametrize("name", UNREAD_DAMAGE)
def test_damage_besides_rows_is_found_by_check(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    change(tmp_path, UNREAD_DAMAGE[name])
    with embedded(tmp_path) as store, pytest.raises(CorruptState):
        store.check()


def test_append_to_a_damaged_tail_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    change(tmp_path, f"UPDATE blobs SET bytes = zeroblob(length(bytes)) WHERE key = {SECOND + 1}")
    with embedded(tmp_path) as store:
        with pytest.raises(CorruptState):
            store.append("a", rows(99))
        with pytest.raises(CorruptState):
            store.truncate("a", 9)
        assert store.append("b", rows(99)) == 11


@pytest.mark.parametrize(
    "damage",
    [
        f"DELETE FROM blobs WHERE key = {SECOND + 1}",
        "UPDATE users SET position = position + 1 WHERE number = 1",
        f"UPDATE blobs SET bytes = substr(bytes, 1, 3) WHERE key = {SECOND + 1}",
    ],
)
def test_append_to_a_tail_of_another_length_is_refused(tmp_path: Path, damage: str) -> None:
    fill(tmp_path)
    change(tmp_path, damage)
    with embedded(tmp_path) as store, pytest.raises(CorruptState):
        store.append("a", rows(99))


def test_cuts_at_a_missing_segment_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    change(tmp_path, DAMAGE["missing"])
    with embedded(tmp_path) as store:
        with pytest.raises(CorruptState, match="misses segments"):
            store.truncate("a", 6)
        with pytest.raises(CorruptState, match="misses segments"):
            store.drop_before("a", 9)
        assert store.position("a") == 10


def test_a_damaged_database_file_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "history.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(CorruptState, match="does not verify"):
        embedded(tmp_path)
