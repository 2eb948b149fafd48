"""Calibrated costs kept from start to start, in one JSON file of the user's cache folder.

Derived data: whatever cannot be read or written is passed over with a line in the log.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mtserve.errors import InvalidArgument
from mtserve.restore.costs import Costs

log = logging.getLogger(__name__)

FORMAT = "mtserve costs 1"
MAX_ENTRIES = 64


@dataclass(frozen=True)
class CostKey:
    """What costs depend on; not the weights. `software`: versions of the driver and the libraries, as one text.

    `kernels`: everything that says how batches are run. `format`: of the host's pages, and of the
    device's where that is not the model's own. `batches`: which were timed, as
    limits of the model, the pool and the configuration admit larger or smaller ones. `link_bytes`: copied once a size of
    piece; 0 where the host had no pages.
    """

    gpu: str
    software: str
    kernels: str
    layers: int
    d: int
    heads: int
    head_dim: int
    dtype: str
    page_tokens: int
    format: str
    batches: str
    link_bytes: int


def default_path() -> Path | None:
    """mtserve/costs.json in $XDG_CACHE_HOME, else in ~/.cache; None for a user without a home."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(folder):  # others are to be ignored, as the convention has it
        return Path(folder) / "mtserve" / "costs.json"
    try:
        return Path.home() / ".cache" / "mtserve" / "costs.json"
    except RuntimeError:
        return None


class CostCache:
    """Costs by key, the `entries` used last kept. `path` None: nothing is kept.

    A file is replaced whole. Of two processes that write at once one may lose what it wrote.
    """

    def __init__(self, path: Path | None, entries: int = MAX_ENTRIES) -> None:
        self._path, self._entries = path, entries

    def get(self, key: CostKey) -> Costs | None:
        """What was put last for an equal key."""
        return self.entries().get(key)

    def put(self, key: CostKey, costs: Costs) -> None:
        """Keep `costs`, and let the oldest go where there are too many."""
        if self._path is None:
            return
        kept = self.entries()
        kept.pop(key, None)
        kept[key] = costs
        newest = list(kept.items())[-self._entries :]
        entries = [{"key": asdict(each), "costs": found.to_table()} for each, found in newest]
        try:
            _replace(self._path, json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n")
        except OSError as error:
            log.warning("calibrated costs were not kept: %s", error)

    def entries(self) -> dict[CostKey, Costs]:
        """Every good entry of the file, oldest first."""
        if self._path is None:
            return {}
        try:
            entries = _entries(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s is not read: %s", self._path, error)
            return {}
        found: dict[CostKey, Costs] = {}
        for entry in entries:
            try:
                found[_key(entry.get("key"))] = Costs.from_table(entry.get("costs"))
            except InvalidArgument as error:
                log.warning("an entry of %s is not read: %s", self._path, error)
        return found


def _entries(content: Any) -> list[dict[str, Any]]:
    """Raises InvalidArgument for what another program wrote."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidArgument(f"is not {FORMAT!r}", field="format")
    entries = content.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidArgument("expected a list of tables", field="entries")
    return entries


def _key(table: Any) -> CostKey:
    kinds = {item.name: item.type for item in fields(CostKey)}
    if not isinstance(table, dict) or {name: type(value).__name__ for name, value in table.items()} != kinds:
        raise InvalidArgument(f"expected {', '.join(kinds)}", field="key")
    return CostKey(**table)


def _replace(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError:
        os.unlink(partial)
        raise
