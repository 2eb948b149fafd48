"""What the runner says it computed, and what it refuses to promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_world import World
from small_models import small_model

from mtserve.config import EngineConfig
from mtserve.engine.engine import Engine
from mtserve.errors import InvalidArgument

Make = Callable[..., World]


def test_a_plain_runner_counts_the_rows_of_every_batch_and_pads_none(world: Make) -> None:
    w = world()
    assert w.engine.stats()["runner"] == {"rows": 0, "padded_rows": 0, "padded_rows_share": None}
    w.put("a", 5)
    w.score("a", 4)  # 2 U features, 5 behaviours, 4 candidates
    assert w.engine.stats()["runner"]["rows"] == 11
    w.append("a", 2)
    w.score("a", 5)
    assert w.engine.stats()["runner"] == {"rows": 18, "padded_rows": 0, "padded_rows_share": None}
    assert w.engine.metrics.distribution("batch_tokens").sum == 18


def test_a_replaced_model_gets_a_runner_that_counts_anew(world: Make) -> None:
    w = world()
    w.put("a", 9)
    w.score("a")
    w.replace(small_model(1))
    assert w.engine.stats()["runner"]["rows"] == 0
    w.score("a", 3)
    assert w.engine.stats()["runner"]["rows"] == 14


@pytest.mark.parametrize("kernels", ["eager", "reference", "auto"])
def test_only_the_cuda_kernels_promise_the_same_bits(kernels: str) -> None:
    config = EngineConfig(device="cpu", kernels=kernels, deterministic=True, gpu_cache="1MiB", host_cache="0")
    with pytest.raises(InvalidArgument, match="needs the cuda kernels") as caught:
        Engine(small_model(), config, start=False)
    assert caught.value.field == "deterministic"
