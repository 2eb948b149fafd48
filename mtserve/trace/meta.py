"""What a trace file says of its origin, as the JSON object both formats carry."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from mtserve.errors import InvalidArgument
from mtserve.trace.schema import FORMAT, TraceMeta

MAX_ENTRIES = 256
MAX_TEXT = 4096
_FIELDS = ("kind", "format", "name", "source", "seed", "calibrated-synthetic", "changes", "config")


def meta_to_dict(meta: TraceMeta) -> dict[str, Any]:
    """The object of a meta line, without its kind."""
    return {
        "format": FORMAT,
        "name": meta.name,
        "source": meta.source,
        "seed": meta.seed,
        "calibrated-synthetic": meta.calibrated_synthetic,
        "changes": dict(meta.changes),
        "config": dict(meta.config),
    }


def meta_from_dict(row: dict[str, Any], where: str) -> TraceMeta:
    """Inverse of `meta_to_dict`; every field may be missing. Raises InvalidArgument, `where` naming file and line."""

    def fail(field: str, why: str) -> NoReturn:
        raise InvalidArgument(f"{where}: {why}", field=field)

    for name in row:
        if name not in _FIELDS:
            fail(name[:80], f"unknown field of meta; known are {', '.join(_FIELDS)}")
    if row.get("format", FORMAT) != FORMAT:
        fail("format", f"{str(row['format'])[:80]!r} is not {FORMAT}")
    for name in ("name", "source"):
        if not isinstance(row.get(name, ""), str) or len(row.get(name, "")) > MAX_TEXT:
            fail(name, f"expected a string of at most {MAX_TEXT} characters")
    seed, synthetic = row.get("seed"), row.get("calibrated-synthetic", False)
    if seed is not None and type(seed) is not int:
        fail("seed", "expected an integer or null")
    if type(synthetic) is not bool:
        fail("calibrated-synthetic", "expected true or false")
    for name, kinds in (("changes", (int,)), ("config", (int, float, str, bool))):
        table = row.get(name, {})
        if not isinstance(table, dict) or len(table) > MAX_ENTRIES:
            fail(name, f"expected an object of at most {MAX_ENTRIES} entries")
        for key, value in table.items():
            if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
                fail(f"{name}.{key[:80]}", "expected a number" if name == "changes" else "expected a plain value")
    return TraceMeta(
        name=row.get("name", "trace"), source=row.get("source", ""), seed=seed, calibrated_synthetic=synthetic,
        changes=row.get("changes", {}), config=row.get("config", {}),
    )  # fmt: skip


def meta_to_json(meta: TraceMeta) -> str:
    return json.dumps(meta_to_dict(meta))


def meta_from_json(text: bytes, where: str) -> TraceMeta:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{where}: not JSON: {error}"[:300], field="meta") from None
    if not isinstance(row, dict):
        raise InvalidArgument(f"{where}: not a JSON object", field="meta")
    return meta_from_dict(row, where)
