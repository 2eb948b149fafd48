"""A study's cells and curves as JSON-able values; units are in the names."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mtserve.provenance import commit
from mtserve.trace.simulate.cells import CellResult
from mtserve.trace.simulate.miss_ratio import Curve
from mtserve.trace.simulate.study import Sizing, Study


def summarise_cells(study: Study) -> list[dict[str, Any]]:
    """One object a cell. Hit ratios are those of a replay's summary; capacities are as they were asked for."""
    facts = {
        "trace": study.trace.meta.name,
        "calibrated-synthetic": study.trace.meta.calibrated_synthetic,
        "model": study.model.name,
        "requests": study.trace.requests,
        "working_set_bytes": study.working_set_bytes,
        "machine": study.machine,
        "gpu_format": study.engine.gpu_format,
        "host_format": study.engine.host_format,
        "pins": None if study.pinned is None else asdict(study.pinned),
        "commit": commit(),
    }
    return [{**_cell(result), **facts} for result in study.cells]


def _cell(result: CellResult) -> dict[str, Any]:
    cell, counters = result.cell, result.counters
    return {
        "policy": cell.policy,
        "gpu_cache": cell.gpu.text,
        "host_cache": cell.host.text,
        "gpu_bytes": cell.gpu.bytes,
        "host_bytes": cell.host.bytes,
        "gpu_users": result.gpu_users,
        "hit_ratio": result.hit_ratio,
        "hit_ratio_after_first": result.hit_ratio_after_first,
        "hit_ratio_by_pin": result.hit_ratio_by_pin,
        "optimum_token_hit_ratio": result.optimum,
        "loaded_bytes": result.loaded_bytes,
        "stored_bytes": result.stored_bytes,
        "evicted_pages": {"gpu": counters.gpu.evicted_pages, "host": counters.host.evicted_pages},
        "pinned_pages": {"gpu": counters.gpu.pinned_pages, "host": counters.host.pinned_pages},
        "predicted": {
            "requests_per_s": result.forecast.requests_per_s,
            "p50_ms": result.forecast.p50_ms,
            "p99_ms": result.forecast.p99_ms,
        },
    }


def summarise_sizing(sizing: Sizing) -> dict[str, Any]:
    """The curves of one tier, and the bytes that targets take; null where no memory is enough."""
    return {
        "sampled_users": sizing.users,
        "sampled_share_of_pages": sizing.share,
        "lru_mean_absolute_error": sizing.lru_error,
        "curves": [_curve(curve, sizing.page_bytes) for curve in sizing.curves],
    }


def _curve(curve: Curve, page_bytes: int) -> dict[str, Any]:
    return {
        "policy": curve.policy,
        "bytes": (curve.pages * page_bytes).tolist(),
        "token_hit_ratio": curve.ratio.tolist(),
        "best_after_first": curve.best,
        "bytes_for_after_first": {
            f"{answer.target:g}": None if answer.pages is None else answer.pages * page_bytes
            for answer in curve.answers
        },
    }
