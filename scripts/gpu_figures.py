"""Fits the rates of mtserve/restore/gpus.py to what the benchmarks measured, and prints them with their errors.

    python scripts/gpu_figures.py

Least squares of the relative errors: a layer's three rates over all cases of forward.json; how much longer attention is
over pages of a byte a value, over the layers of gpu_format.json; what a batch takes beside its
layers over the encoded batches of restore.json; link and unpacking over its loaded and split ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_forward import Case, cases  # noqa: E402
from bench_gpu_format import CASES as FP8_CASES  # noqa: E402

from mtserve.config import EngineConfig, ModelConfig  # noqa: E402
from mtserve.model.cut import cut_history  # noqa: E402
from mtserve.model.presets import default_schema, preset  # noqa: E402
from mtserve.restore.choice import Need, user_work  # noqa: E402
from mtserve.restore.fit import fit_nonnegative  # noqa: E402
from mtserve.restore.gpus import GPUS, GpuFigures, product_flop  # noqa: E402
from mtserve.trace.simulate.machine import Machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
Floats = npt.NDArray[np.float64]
# Around what a copy alone reaches (transfer.json), and around what unpacking is known to take.
LINK_BYTES_PER_S = (44e9, 46e9, 48e9, 50e9, 52.6e9)
LOAD_S = (2e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4)
UNPACK_S = (1e-12, 2e-12, 2.5e-12, 3e-12, 3.5e-12, 4e-12, 5e-12)
WAYS = ("recompute", "load", "split", "auto")


def relative_fit(terms: Floats, values: Floats, off: Floats | float = 0.0) -> Floats:
    """[m] of the least sum of ((off + terms c - values) / values)^2, none negative."""
    scaled = terms / values[:, None]
    scale = scaled.max(axis=0)
    return fit_nonnegative(scaled / scale, (values - off) / values) / scale


def fit_layers() -> tuple[Floats, Floats]:
    """(seconds of a layer, of a FLOP of products, of attention; relative error of each case)."""
    measured = {row["case"]: row["ms"] / 1e3 for row in json.loads((RESULTS / "forward.json").read_text())["results"]}
    terms, values = [], []
    for case in cases():
        terms.append(_case_terms(case))
        values.append(measured[case.name] / preset(case.model).layers)
    found = relative_fit(np.array(terms), np.array(values))
    return found, np.array(terms) @ found / np.array(values) - 1


def fit_fp8(layers: Floats) -> tuple[float, Floats]:
    """(how many times as long attention over pages of a byte a value takes, relative error of each case's layers)."""
    result = json.loads((RESULTS / "gpu_format.json").read_text())["layers"]
    measured = {row["case"]: row["fp8"]["ms"] / 1e3 for row in result}
    terms = np.array([_case_terms(case) for case in FP8_CASES])
    values = np.array([measured[case.name] / preset(case.model).layers for case in FP8_CASES])
    others, attention = terms[:, :2] @ layers[:2], terms[:, 2:] * layers[2]
    found = relative_fit(attention, values, others)
    return float(found[0]), (others + attention @ found) / values - 1


def _case_terms(case: Case) -> tuple[float, float, float]:
    model = preset(case.model)
    frozen = case.static if model.static_attention == "full" else 0
    work = user_work(case.cached, case.history + case.new, case.candidates, frozen)
    return _layer_terms(model, case.users * work.rows, case.users * work.pairs)


def _layer_terms(model: ModelConfig, rows: int, pairs: int) -> tuple[float, float, float]:
    return 1.0, float(rows * product_flop(model)), float(pairs * 4 * model.heads * model.head_dim)


def batches() -> Iterator[tuple[dict[str, Any], ModelConfig, Need]]:
    """The restored batches: as measured, the model, and what each of its users needs."""
    result = json.loads((RESULTS / "restore.json").read_text())
    user_tokens = len(default_schema().user)
    for case in (*result["table"], *result["grid"]):
        model, behaviours = preset(case["model"]), case["history"] + case["new"]
        if behaviours > model.max_history:
            model = replace(model, max_history=behaviours, max_realtime=behaviours)
        cut = cut_history(behaviours, model)
        frozen = user_tokens + cut.static_end - cut.start if model.static_attention == "full" else 0
        prefix = user_tokens + cut.kept
        yield case, model, Need(prefix, 0, prefix - case["new"], case["candidates"], frozen)


def fit_batches(layers: Floats) -> Floats:
    """Seconds of a batch beside its layers, of a request, of a row."""
    terms, values, known = [], [], []
    for case, model, need in batches():
        work = user_work(0, need.prefix, need.candidates, need.frozen)
        rows = case["users"] * work.rows
        terms.append((1.0, case["users"], rows))
        known.append(model.layers * float(np.dot(_layer_terms(model, rows, case["users"] * work.pairs), layers)))
        values.append(case["ms"]["recompute"] / 1e3)
    return relative_fit(np.array(terms), np.array(values), np.array(known))


def errors(figures: GpuFigures, ways: tuple[str, ...]) -> Floats:
    """[ways x batches] (predicted - measured) / measured."""
    found = []
    for case, model, need in batches():
        engine = EngineConfig(host_format=case["format"], host_cache="1GiB")
        machine = Machine.of(model, engine, torch.bfloat16, figures)
        for way in ways:
            found.append(machine.batch_s([need] * case["users"], (), way) * 1e3 / case["ms"][way] - 1)
    return np.array(found)


def fit() -> tuple[GpuFigures, Floats, Floats]:
    """(the H200's figures, the layers' relative errors, those of layers over pages of a byte a value)."""
    layers, off = fit_layers()
    fp8_attention, fp8_off = fit_fp8(layers)
    rest = fit_batches(layers)
    base = replace(
        GPUS["h200"], layer_s=layers[0], product_s=layers[1], attention_s=layers[2], fp8_attention=fp8_attention,
        batch_s=rest[0], request_s=rest[1], plan_row_s=rest[2],
    )  # fmt: skip
    candidates = [
        replace(base, link_bytes_per_s=rate, load_s=load_s, unpack_s=unpack_s)
        for rate, load_s, unpack_s in product(LINK_BYTES_PER_S, LOAD_S, UNPACK_S)
    ]
    return min(candidates, key=lambda each: float(np.square(errors(each, ("load", "split"))).mean())), off, fp8_off


def main() -> None:
    figures, off, fp8_off = fit()
    for name, value in vars(figures).items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.3g')}")
    told = {"layers of a batch": off, "layers over fp8 pages": fp8_off} | {way: errors(figures, (way,)) for way in WAYS}
    for name, found in told.items():
        print(f"{name}: off by {100 * np.abs(found).mean():.1f}% in the mean, {100 * np.abs(found).max():.0f}% at most")


if __name__ == "__main__":
    main()
