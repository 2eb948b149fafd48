"""How far off LRU's miss-ratio curve is when it comes from some of the users, by how the sample is made to stand for all.

    plain     the share asked for scales capacities, ratios are of the sample's own tokens
    adjusted  SHARDS-adj (Waldspurger et al., FAST 2015): tokens that the sample lacks of its share count as found
    ours      mtserve/trace/simulate/sampling.py: capacities by the share of pages, ratios by what could be found

The error is the mean |sampled - exact| of the token hit ratio over 200 sizes of the tier, in points; of each case the
mean and the largest over SEEDS samples. Before anything is reported, a sample of everybody has to give the exact curve.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from arguments import make_parser, write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtserve import provenance
from mtserve.model.presets import preset
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.simulate.config import SimulateConfig
from mtserve.trace.simulate.demand import Demand, demand_of
from mtserve.trace.simulate.miss_ratio import SMALLEST_SHARE, sampling_error
from mtserve.trace.simulate.reuse import lru_hits
from mtserve.trace.simulate.sampling import Sample, draw, everybody, most_pages

PAGE_TOKENS = 64
SEEDS = 20
POINTS = 200
CASES = (  # users, requests, model
    (20_000, 100_000, "hstu-512"),
    (20_000, 400_000, "mtgr-small"),
    (80_000, 400_000, "hstu-512"),
)
RATES = (0.1, 0.3)


def ratios(sample: Sample, demand: Demand, rate: float) -> dict[str, npt.NDArray[np.float64]]:
    """Token hit ratio by capacity of each way; "exact" is that of all users."""
    everything = int(most_pages(demand, PAGE_TOKENS).sum())
    sizes = np.geomspace(SMALLEST_SHARE * everything, everything, POINTS)
    hits, all_hits = lru_hits(sample.demand, PAGE_TOKENS), lru_hits(demand, PAGE_TOKENS)
    tokens, all_tokens = (int(each.tokens.sum(dtype=np.int64)) for each in (sample.demand, demand))

    def at(share: float, found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return found[np.minimum(np.rint(sizes * share).astype(np.int64), len(found) - 1)]

    lacking = rate * all_tokens - tokens
    return {
        "exact": at(1.0, all_hits) / all_tokens,
        "plain": at(rate, hits) / tokens,
        "adjusted": (at(rate, hits) + lacking) / (rate * all_tokens),
        "ours": at(sample.share, hits) * sample.ratio_per_token,
    }


def measure(users: int, requests: int, model: str, rate: float) -> dict[str, float | str]:
    """One case. Raises SystemExit where a sample of everybody is not exact."""
    config = GeneratorConfig(users=users, requests=requests, candidates_mean=2.0, clicks_mean=1.0)
    demand = demand_of(generate(config), preset(model), 3)
    if sampling_error(everybody(demand), demand, PAGE_TOKENS) != 0.0:
        raise SystemExit("a sample of everybody differs from everybody; no report")
    errors: dict[str, list[float]] = {"plain": [], "adjusted": [], "ours": []}
    for seed in range(SEEDS):
        found = ratios(draw(demand, SimulateConfig(sample_rate=rate, sample_seed=seed), PAGE_TOKENS), demand, rate)
        for name, each in errors.items():
            each.append(100 * float(np.abs(found[name] - found["exact"]).mean()))
    row: dict[str, float | str] = {"users": users, "requests": requests, "model": model, "rate": rate}
    for name, each in errors.items():
        row |= {f"{name}_mean_points": round(float(np.mean(each)), 3), f"{name}_largest_points": round(max(each), 3)}
    return row


def main() -> None:
    args = make_parser(__doc__, "sampling.json").parse_args()
    report = {
        "benchmark": "sampling",
        "seeds": SEEDS,
        "points": POINTS,
        "results": [measure(*case, rate) for case in CASES for rate in RATES],
        **provenance.stamp(seed=0),
    }
    write_report(report, args.out)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
