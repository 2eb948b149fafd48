from __future__ import annotations

import numpy as np
import pytest
from demands import demand, growing

from mtserve.errors import InvalidArgument
from mtserve.model.presets import preset
from mtserve.trace.generator.config import GeneratorConfig
from mtserve.trace.generator.synthesis import generate
from mtserve.trace.simulate.config import SimulateConfig
from mtserve.trace.simulate.demand import Demand, demand_of
from mtserve.trace.simulate.miss_ratio import TARGETS, Curve, curves, lru_ratio, sampling_error
from mtserve.trace.simulate.reuse import reusable_tokens
from mtserve.trace.simulate.rounds import Rounds
from mtserve.trace.simulate.run import DEFAULT_LIMITS, simulate
from mtserve.trace.simulate.sampling import Sample, draw, everybody, hash_users, most_pages

PAGE = 64


@pytest.fixture(scope="module")
def wide() -> Demand:
    """20,000 users, as many as make a sample of a tenth worth looking at."""
    config = GeneratorConfig(users=20_000, requests=60_000, history_median=50, candidates_mean=2.0, clicks_mean=1.0)
    return demand_of(generate(config), preset("hstu-512"), 3)


def _curves(of: Demand, sample: Sample, *policies: str) -> list[Curve]:
    return curves(policies, sample, of, PAGE, DEFAULT_LIMITS, Rounds(1), lambda done, total: None)


def test_a_sample_has_whole_users_and_about_its_share(wide: Demand) -> None:
    sample = draw(wide, SimulateConfig(sample_rate=0.1), PAGE)
    asking = len(np.unique(wide.user))
    assert 0.09 * asking < sample.demand.users < 0.11 * asking
    chosen = np.unique(wide.user)[hash_users(np.unique(wide.user), 0) < 0.1 * 2**32]
    inside = np.isin(wide.user, chosen)
    assert sample.demand.requests == inside.sum()
    assert (chosen[sample.demand.user] == wide.user[inside]).all()
    assert (sample.demand.tokens_after == wide.tokens_after[inside]).all()
    assert wide.keys is not None and (sample.demand.keys == wide.keys[chosen]).all()
    assert sample.ratio_per_token * reusable_tokens(sample.demand) == pytest.approx(
        reusable_tokens(wide) / wide.tokens.sum(dtype=np.int64)
    )
    assert sample.share == most_pages(sample.demand, PAGE).sum() / most_pages(wide, PAGE).sum()


def test_the_rate_follows_from_the_users_wanted_and_another_seed_draws_others(wide: Demand) -> None:
    asking = len(np.unique(wide.user))
    sample = draw(wide, SimulateConfig(sample_users=2000), PAGE)
    assert 1850 < sample.demand.users < 2150
    assert draw(wide, SimulateConfig(sample_users=asking), PAGE) == everybody(wide)
    other = draw(wide, SimulateConfig(sample_users=2000, sample_seed=1), PAGE)
    assert other.demand.requests != sample.demand.requests


def test_a_sample_is_never_empty() -> None:
    sample = draw(demand([4, 9, 4], [10, 20, 30]), SimulateConfig(sample_rate=1e-12), PAGE)
    assert sample.demand.users == 1 and sample.demand.requests in (1, 2)


def test_lrus_curve_of_a_tenth_of_the_users_is_close_to_the_exact_one(wide: Demand) -> None:
    """README and docs/simulate.md state this bound."""
    errors = [
        sampling_error(draw(wide, SimulateConfig(sample_rate=0.1, sample_seed=seed), PAGE), wide, PAGE)
        for seed in range(5)
    ]
    assert 0 < np.mean(errors) < 0.003
    assert max(errors) < 0.006


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_a_scaled_down_simulation_is_close_to_the_whole(wide: Demand, policy: str) -> None:
    (curve,) = _curves(wide, draw(wide, SimulateConfig(sample_rate=0.1), PAGE), policy)
    places = np.linspace(0, len(curve.pages) - 1, 6).astype(int)
    whole = [
        simulate(wide, policy=policy, gpu_pages=int(pages), host_pages=0, page_tokens=PAGE).hit_ratio["token"]["total"]
        for pages in curve.pages[places]
    ]
    assert np.abs(curve.ratio[places] - whole).mean() < 0.005
    assert curve.ratio[-1] == pytest.approx(whole[-1], abs=1e-9)


def test_everybodys_curve_is_the_exact_one_and_ends_where_nothing_is_evicted() -> None:
    of = growing(np.random.default_rng(1), users=40, requests=1000, longest=3000)
    lru, sieve = _curves(of, everybody(of), "lru", "sieve")
    assert (lru.ratio == lru_ratio(everybody(of), lru.pages, PAGE)).all()
    assert lru.pages[-1] == sieve.pages[-1] == most_pages(of, PAGE).sum()
    assert lru.ratio[-1] == sieve.ratio[-1]
    assert (np.diff(lru.ratio) >= 0).all()
    repeats = np.array([number in of.user[:place] for place, number in enumerate(of.user)])
    assert lru.best == pytest.approx(lru.ratio[-1] * of.tokens.sum() / of.tokens[repeats].sum())


@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_targets_name_the_least_memory_that_reaches_them(policy: str) -> None:
    of = growing(np.random.default_rng(2), users=60, requests=3000, longest=6000)
    (curve,) = _curves(of, everybody(of), policy)
    assert [answer.target for answer in curve.answers] == list(TARGETS)
    reached = [answer for answer in curve.answers if answer.pages is not None]
    assert reached and all(answer.target > curve.best for answer in curve.answers if answer.pages is None)
    for answer in reached:
        assert answer.pages is not None

        def ratio(pages: int) -> float:
            run = simulate(of, policy=policy, gpu_pages=pages, host_pages=0, page_tokens=PAGE)
            return run.hit_ratio["token"]["total"] * curve.after_first

        assert ratio(answer.pages) >= answer.target
        assert ratio(round(0.9 * answer.pages)) < answer.target


def test_a_target_above_what_everything_finds_has_no_answer() -> None:
    of = demand([0, 0, 1, 1], [100, 200, 100, 200])  # half of each second request is new
    (curve,) = _curves(of, everybody(of), "lru")
    assert curve.best == 0.5
    assert all(answer.pages is None for answer in curve.answers)


def test_results_do_not_depend_on_how_many_run_at_once() -> None:
    of = growing(np.random.default_rng(3), users=50, requests=500)
    names = ("lru", "sieve", "arc", "gdsf", "wtinylfu")
    found = [
        curves(names, everybody(of), of, PAGE, DEFAULT_LIMITS, Rounds(jobs), lambda done, total: None)
        for jobs in (1, 4)
    ]
    assert [curve.policy for curve in found[0]] == list(names)
    for one, four in zip(*found, strict=True):
        assert one.answers == four.answers
        assert (one.ratio == four.ratio).all()


def test_the_first_error_ends_all_jobs_and_progress_tells_of_all() -> None:
    told: list[tuple[int, int]] = []

    def job(report: object) -> int:
        assert callable(report)
        report(1, 2)
        report(2, 2)
        return 7

    assert Rounds(2).run([job, job, job], 2, lambda done, total: told.append((done, total))) == [7, 7, 7]
    assert told[-1] == (6, 6)
    assert all(total == 6 for _, total in told)

    def broken(report: object) -> int:
        raise InvalidArgument("is wrong", field="policy")

    with pytest.raises(InvalidArgument, match="policy: is wrong"):
        Rounds(2).run([job, broken, job], 2, lambda done, total: None)
