"""States of fp8: half the bytes in both tiers, and the scores of one full pass that rounds in the same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import World
from restored_worlds import LAYERS, SPLITS, SomeFail, deep_world, on_the_host, push_off
from small_models import small_model

from mtserve.errors import InvalidArgument
from mtserve.kernels.page_write.rounding import FP8, LARGEST_FP8
from mtserve.model.reference import recompute
from mtserve.model.state_bound import state_bound
from mtserve.model.weights import initialise
from mtserve.restore.costs import costs_for_cpu

Make = Callable[..., World]
TIGHT = 1e-5
ADDED = 0.06  # relative L2 of the logits that rounding may add in models as small as these


def fp8_world(world: Make, **config: Any) -> World:
    return deep_world(world, gpu_format="fp8", **config)


def gap(w: World, user: str, count: int = 5) -> float:
    """The largest difference of a verified score's logits from the recompute that rounds."""
    pending = w.submit(user, count)
    w.run()
    return float(np.abs(pending.verify().logits - pending.expected()).max())


@pytest.mark.parametrize("page_tokens", [1, 3, 64])
@pytest.mark.parametrize("kernels", ["eager", "reference"])
def test_scores_do_not_depend_on_how_the_history_was_cut(world: Make, page_tokens: int, kernels: str) -> None:
    w = fp8_world(world, page_tokens=page_tokens, gpu_pages=80, host_pages=0, kernels=kernels)
    w.put("a", 7)
    gaps = []
    for count in (0, 1, 2, 1, 5, 3, 11, 1, 9, 1, 30, 1):
        w.append("a", count)
        gaps.append(gap(w, "a"))
    # A number half way between two may fall either way; that is rare.
    assert sum(each <= TIGHT for each in gaps) >= 9
    assert w.score("a").encoded_tokens == 0
    w.assert_empty()


@pytest.mark.parametrize("layer", [0, *SPLITS, LAYERS])
def test_users_come_and_go_between_the_tiers(world: Make, layer: int) -> None:
    """Loaded, encoded again, or some layers of each: the same scores, though neighbours rounded again and again."""
    w = fp8_world(world, gpu_pages=22, host_pages=400)
    on_the_host(w, "a", "b")
    w.restore_at(layer)
    gaps = []
    for cycle in range(8):
        for user in "ab":
            w.append(user, cycle % 3)
            gaps.append(gap(w, user))
        push_off(w, "a", "b")
    assert sum(each <= TIGHT for each in gaps) >= 12
    assert (w.value("load_bytes_total") > 0) == (layer < LAYERS)
    w.assert_empty()


def test_loads_that_fail_are_encoded_again(world: Make) -> None:
    fails = SomeFail()
    w = fp8_world(world, gpu_pages=22, restore="load", fault=fails)
    on_the_host(w, "a", "b")
    fails.begin(0, 2)
    assert max(gap(w, user) for user in "abab") <= w.tolerance
    w.assert_empty()


def test_the_hosts_bytes_are_the_devices(world: Make) -> None:
    w = fp8_world(world, gpu_pages=14, restore="load")
    w.put("a", 19)
    w.score("a")
    mover = w.tiers.mover
    before = sorted(_rows(mover.arena, 4))
    push_off(w, "a")
    w.score("a")
    assert mover.pool.dtype == mover.arena.dtype == FP8
    assert set(before) <= set(_rows(mover.pool, 4))


def _rows(pages: torch.Tensor, tokens: int) -> list[bytes]:
    """What each full page of states holds, as bytes; pages with poison in them are left out."""
    whole = [page for page in pages if page.float().isfinite().all() and page.shape[3] >= 1]
    assert all(page.shape[2] == tokens for page in whole)
    return [page.view(torch.uint8).numpy().tobytes() for page in whole]


def test_a_page_takes_half_of_bf16_and_a_quarter_of_fp32(world: Make) -> None:
    native, half = world(), world(gpu_format="fp8")
    values = native.model.config.state_values_per_token * 4
    assert native.engine.stats()["page_bytes"] == 4 * values
    assert half.engine.stats()["page_bytes"] == values
    assert half.engine.stats()["gpu_format"] == "fp8"
    for tier in ("gpu", "host"):
        assert half.engine.stats()["tiers"][tier]["page_bytes"] == values
    # The same bytes for twice the pages, without a byte of scales.
    bf16 = world(dtype="bfloat16", tolerance=1.0)
    assert 2 * half.engine.stats()["page_bytes"] == bf16.engine.stats()["page_bytes"]


def test_rounding_moves_scores_a_little(world: Make) -> None:
    """The error is measured against weights and states that nothing rounds; it is there, and it is bounded."""
    w = world(small_model(layers=4, d=64, heads=4, head_dim=16, max_history=200), gpu_format="fp8", gpu_pages=200,
              tolerance=0.02)  # fmt: skip
    errors = []
    for number in range(1, 6):
        w.put(f"{number}", 35 * number)
        pending = w.submit(f"{number}", 20)
        w.run()
        truth = recompute(w.truth, pending.history, pending.candidates).numpy()
        errors.append(np.linalg.norm(pending.verify().logits - truth) / np.linalg.norm(truth))
    assert 1e-3 < max(errors) < ADDED


def test_without_a_cache_nothing_is_rounded(world: Make) -> None:
    w = world(gpu_format="fp8", cache="off")
    w.put("a", 20)
    pending = w.submit("a", 4)
    w.run()
    truth = recompute(w.truth, pending.history, pending.candidates).numpy()
    np.testing.assert_allclose(pending.future.result(0).logits, truth, rtol=0, atol=TIGHT)


def test_freed_pages_are_poisoned_in_both_tiers(world: Make) -> None:
    w = fp8_world(world, gpu_pages=14)
    on_the_host(w, "a")
    w.engine.invalidate()
    w.run()
    assert w.tiers.mover.pool.float().isnan().all() and w.tiers.mover.arena.float().isnan().all()


def test_weights_whose_states_may_be_too_large_are_refused(world: Make) -> None:
    def scaled(factor: float) -> Any:
        model = initialise(small_model(), 0)
        with torch.no_grad():
            for layer in model.layers:
                layer.uvqk_weight *= factor
                layer.uvqk_bias *= factor
        return model

    once = state_bound(scaled(1.0))
    fits, exceeds = scaled(0.99 * LARGEST_FP8 / once), scaled(1.01 * LARGEST_FP8 / once)
    w = world(gpu_format="fp8", tolerance=0.02)
    with pytest.raises(InvalidArgument, match="may reach") as caught:
        w.engine.replace_model(exceeds)
    assert caught.value.field == "gpu_format"
    w.put("a", 9)
    w.score("a")  # by the weights before
    w.engine.replace_model(fits)
    with pytest.raises(InvalidArgument, match="may reach"):
        world(exceeds, gpu_format="fp8")
    world(exceeds)


def test_costs_of_restoring_are_those_of_fewer_bytes(world: Make) -> None:
    """What batches decide by counts the bytes that cross the link."""
    pages = {}
    for gpu_format in ("native", "fp8"):
        w = deep_world(world, gpu_format=gpu_format, costs=costs_for_cpu(), gpu_pages=22, restore="load")
        on_the_host(w, "a")
        before = w.value("load_bytes_total")
        w.score("a")
        pages[gpu_format] = w.value("load_bytes_total") - before
    assert 0 < 4 * pages["fp8"] == pages["native"]
