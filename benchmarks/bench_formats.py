"""What each format of states costs in accuracy, on trained weights and held-out users, in float32.

    python benchmarks/bench_formats.py

Each user's sequence is encoded once, exactly, and K, V and the normalised input of every layer are
kept. Then each format's prefix is restored from what that format keeps of it, and the newest 16
behaviours and all labelled candidates are encoded over it; "gpu fp8" is the device's format, through whose pages the
whole pass goes. One user also goes through 50 cycles of
restoring the prefix, appending one behaviour and writing back what the host lacks: that behaviour.
The weights are those of `trained_model.py`, which trains first where they are not kept yet.
Nothing is reported when the exact logits are not those of a full recompute, when a restore from
unchanged values is not exact, or when a prefix of zeros would rank about as well, the last row; the
exit status is 1 when a bound is broken.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from arguments import make_parser, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ranking_metrics import auc, kendall_tau  # noqa: E402
from row_formats import FORMATS, LOSSLESS, NOTHING, Format  # noqa: E402
from trained_model import SEED, Sample, Tokens, held_out_users, samples, tokens_of, trained_model  # noqa: E402

from mtserve.kernels.backend import load_kernels  # noqa: E402
from mtserve.kernels.plan import KernelPlan  # noqa: E402
from mtserve.model.cut import cut_history  # noqa: E402
from mtserve.model.hstu import HSTULayer  # noqa: E402
from mtserve.model.ranking import RankingModel  # noqa: E402
from mtserve.model.reference import recompute  # noqa: E402
from mtserve.model.weights import fingerprint  # noqa: E402
from mtserve.provenance import stamp  # noqa: E402
from mtserve.trace.replay.agreement import FLOAT32_TOLERANCE, difference  # noqa: E402

NEW_BEHAVIOURS = 16
HISTORIES = range(500, 2001)
LEAST_WORTH = 0.05  # AUC that the prefix must be worth, or its errors would tell nothing
SHOWN_CYCLES = (1, 10, 50)
KERNELS = load_kernels("eager")
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class States:
    """What a pass computed of its prefix tokens: `kv` [layers, T, 2, H, D], `inputs` [layers, T, d]."""

    kv: torch.Tensor
    inputs: torch.Tensor

    def kept(self, form: Format) -> torch.Tensor:
        """[layers, T, ...] what the host keeps in `form`, as it reads when it comes back."""
        return form.codec(self.inputs if form.of_input else self.kv)


@dataclass(frozen=True)
class Quality:
    """One format against the exact logits.

    `spread_error`: standard deviation of the error over that of the logits, which a common offset does not flatter.
    `kendall_tau`: mean over the requests. `relative_l2_after_cycles`: of one user's last request.
    """

    name: str
    layer_bytes: float
    relative_l2: float
    spread_error: float
    max_logit: float
    kendall_tau: float
    min_kendall_tau: float
    auc: float
    auc_change: float
    relative_l2_after_cycles: dict[int, float]


def forward(
    model: RankingModel,
    tokens: Tokens,
    kept: torch.Tensor | None = None,
    form: Format | None = None,
    pages: torch.dtype | None = None,
) -> tuple[Logits, States]:
    """Logits [c] and the states of the tokens encoded: those that are not in `kept` [layers, cached, ...], of `form`.

    `pages`: their type, where it is not the model's.
    """
    config, prefix = model.config, tokens.groups.prefix
    cached = 0 if kept is None else kept.shape[1]
    # NaN, so that a token that nobody restored or wrote cannot go unnoticed.
    pool = torch.full((1, config.layers, 2, prefix, config.heads, config.head_dim), torch.nan, device=model.device)
    pool = pool.to(model.dtype if pages is None else pages)
    if kept is not None and form is not None:
        pool[0, :, :, :cached] = restored(model, kept, form).transpose(1, 2).to(pool.dtype)
    inputs: list[torch.Tensor] = []

    def recorded(*arguments: torch.Tensor) -> torch.Tensor:
        inputs.append(KERNELS.group_layer_norm(*arguments))
        return inputs[-1]

    plan = KernelPlan.of(tokens.plan(cached), model.device)
    x = model.embed(tokens.inputs)[cached:]
    rows = model.encode(x, pool, plan, replace(KERNELS, group_layer_norm=recorded))
    states = States(pool[0, :, :, cached:].transpose(1, 2).to(model.dtype), torch.stack(inputs)[:, : prefix - cached])
    return model.logits(rows[plan.candidate_rows])[:, 0].cpu().numpy(), states


def restored(model: RankingModel, kept: torch.Tensor, form: Format) -> torch.Tensor:
    """[layers, T, 2, H, D] K and V of what the host kept."""
    if not form.of_input:
        return kept
    states = []
    for layer, rows in zip(model.layers, kept, strict=True):
        assert isinstance(layer, HSTULayer)
        mixed = KERNELS.projection_silu(rows, layer.uvqk_weight, layer.uvqk_bias)
        _, v, _, k = mixed.view(len(rows), 4, layer.heads, layer.head_dim).unbind(1)
        states.append(torch.stack((k, v), dim=1))
    return torch.stack(states)


def score_formats(model: RankingModel, sample: Sample, forms: tuple[Format, ...]) -> tuple[Logits, list[Logits]]:
    """Exact logits [c] of a sample, and those of each format."""
    tokens = tokens_of(model, sample.history, sample.candidates)
    exact, states = forward(model, tokens)
    cached = max(tokens.groups.frozen, tokens.groups.prefix - NEW_BEHAVIOURS)
    others = [
        forward(model, tokens, pages=form.pages)[0]
        if form.pages is not None
        else forward(model, tokens, states.kept(form)[:, :cached], form)[0]
        for form in forms
    ]
    return exact, others


def check(model: RankingModel, sample: Sample) -> None:
    """Exits unless exact logits and restores of unchanged values give the scores of a full recompute."""
    exact, others = score_formats(model, sample, LOSSLESS)
    truth = recompute(model, sample.history, sample.candidates).numpy()
    for name, logits in zip(("exact", *(form.name for form in LOSSLESS)), (exact, *others), strict=True):
        found = difference(logits[:, None], truth, sample.offsets)
        if not found.max_score <= FLOAT32_TOLERANCE:
            sys.exit(f"{name}: scores differ from a full recompute by {found.max_score:.3g}; no report")


def cycle_errors(model: RankingModel, sample: Sample, forms: tuple[Format, ...]) -> list[dict[int, float]]:
    """Relative L2 of the last request's logits after so many cycles, for each format."""
    last = max(SHOWN_CYCLES)
    start = sample.history.position - last
    sequences = [_tokens_until(model, sample, start + cycle) for cycle in range(last + 1)]
    exact = {cycle: forward(model, sequences[cycle])[0] for cycle in SHOWN_CYCLES}
    _, states = forward(model, sequences[0])
    return [dict(_cycles(model, sequences, states, form, exact)) for form in forms]


def _tokens_until(model: RankingModel, sample: Sample, position: int) -> Tokens:
    history = replace(sample.history, behaviours=sample.history.behaviours[:position])
    return tokens_of(model, history, sample.candidates[sample.offsets[-2] :])


def _cycles(
    model: RankingModel, sequences: list[Tokens], states: States, form: Format, exact: dict[int, Logits]
) -> Iterator[tuple[int, float]]:
    if form.pages is not None:
        _, states = forward(model, sequences[0], pages=form.pages)
    host = states.kept(form)
    for cycle, tokens in enumerate(sequences[1:], 1):
        logits, new = forward(model, tokens, host, form, form.pages)
        assert new.kv.shape[1] == 1
        host = torch.cat((host, new.kept(form)), dim=1)
        if cycle in exact:
            whole = np.array([0, len(logits)])
            yield cycle, difference(logits[:, None], exact[cycle][:, None], whole).relative_l2


def quality(
    form: Format,
    layer_bytes: float,
    ours: list[Logits],
    exact: list[Logits],
    sets: list[Sample],
    cycles: dict[int, float],
) -> Quality:
    """The figures of one format over all samples."""
    counts = np.concatenate([np.diff(sample.offsets) for sample in sets])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    labels = np.concatenate([sample.clicked for sample in sets])
    got, want = np.concatenate(ours), np.concatenate(exact)
    found = difference(got[:, None], want[:, None], offsets)
    taus = [kendall_tau(got[first:last], want[first:last]) for first, last in itertools.pairwise(offsets)]
    reached = auc(got, labels)
    return Quality(
        name=form.name,
        layer_bytes=layer_bytes,
        relative_l2=found.relative_l2,
        spread_error=float((got - want).std() / want.std()),
        max_logit=found.max_logit,
        kendall_tau=float(np.mean(taus)),
        min_kendall_tau=min(taus),
        auc=reached,
        auc_change=reached - auc(want, labels),
        relative_l2_after_cycles=cycles,
    )


def broken(found: Quality, form: Format) -> list[str]:
    """One line for each bound that does not hold; written so that NaN holds nowhere."""
    if form.bounds is None:
        return []
    bounds, lines = form.bounds, []
    errors = {"": found.relative_l2} | {f" after {n} cycles": e for n, e in found.relative_l2_after_cycles.items()}
    for when, error in errors.items():
        if not error <= bounds.relative_l2:
            lines.append(f"{form.name}: relative L2{when} is {error:.2e}, above {bounds.relative_l2:g}")
    if not found.kendall_tau >= bounds.kendall_tau:
        lines.append(f"{form.name}: Kendall tau is {found.kendall_tau:.4f}, below {bounds.kendall_tau:g}")
    if not abs(found.auc_change) <= bounds.auc_change:
        lines.append(f"{form.name}: AUC changes by {found.auc_change:+.1e}, beyond {bounds.auc_change:g}")
    return lines


def table(results: list[Quality]) -> str:
    """The figures as text."""
    cycles = "".join(f" {f'L2 @{n}':>8}" for n in SHOWN_CYCLES)
    lines = [
        f"{'format':<10} {'bytes':>6} {'rel. L2':>8} {'spread':>8} {'max':>8} {'tau':>7} {'min tau':>7} "
        f"{'AUC':>7} {'change':>8}{cycles}"
    ]
    for r in results:
        drift = "".join(f" {error:8.1e}" for error in r.relative_l2_after_cycles.values())
        lines.append(
            f"{r.name:<10} {r.layer_bytes:6.0f} {r.relative_l2:8.1e} {r.spread_error:8.1e} {r.max_logit:8.1e} "
            f"{r.kendall_tau:7.4f} {r.min_kendall_tau:7.4f} {r.auc:7.4f} {r.auc_change:+8.0e}{drift}"
        )
    return "\n".join(lines)


@torch.inference_mode()
def measure(model: RankingModel, sets: list[Sample]) -> list[Quality]:
    """The figures of every format, and of a prefix of zeros; exits when a check fails."""
    check(model, min(sets, key=lambda sample: sample.history.position))
    forms = (*FORMATS, NOTHING)
    exact, others = zip(*(score_formats(model, sample, forms) for sample in sets), strict=True)
    cycles = cycle_errors(model, next(sample for sample in sets if _long_enough(model, sample)), forms)
    results = [
        quality(form, form.layer_bytes(model.config), list(ours), list(exact), sets, errors)
        for form, ours, errors in zip(forms, zip(*others, strict=True), cycles, strict=True)
    ]
    if not results[-1].auc_change <= -LEAST_WORTH:
        sys.exit(f"AUC changes by {results[-1].auc_change:+.3f} without the prefix: it is hardly used; no report")
    return results


def _long_enough(model: RankingModel, sample: Sample) -> bool:
    """Whether the cycles' behaviours are all of the last generation."""
    position = sample.history.position
    return position - cut_history(position, model.config).static_end > max(SHOWN_CYCLES)


def main() -> int:
    parser = make_parser(__doc__, "formats.json")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--users", type=int, default=40, help="held-out users, of those with 500 to 2000 behaviours")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = trained_model()
    found = samples(rows, held_out_users(rows), model.config)
    sets = [sample for sample in found if sample.history.position in HISTORIES][: options.users]
    results = measure(model.to(options.device), sets)
    print(table(results))
    lines = [line for result, form in zip(results[:-1], FORMATS, strict=True) for line in broken(result, form)]
    print("\n".join(lines) or "every bound holds")
    report: dict[str, Any] = {
        "stamp": stamp(seed=SEED, device=options.device),
        "model": asdict(model.config),
        "fingerprint": fingerprint(model),
        "users": len(sets),
        "requests": sum(len(sample.offsets) - 1 for sample in sets),
        "candidates": sum(len(sample.clicked) for sample in sets),
        "history_tokens": [min(s.history.position for s in sets), max(s.history.position for s in sets)],
        "new_behaviours": NEW_BEHAVIOURS,
        "broken": lines,
        "results": [asdict(result) for result in results],
    }
    write_report(report, options.out)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
