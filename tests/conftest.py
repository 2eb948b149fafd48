"""What every suite shares: Hypothesis profiles, and GPU tests that cannot pass by not running."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

# Derandomised, so that a failure repeats; "soak" is the long, random run.
# Explaining a failure traces every line, which takes minutes on the stateful machines: left to a second look.
QUICK = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), phases=QUICK)
settings.register_profile(
    "first", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
settings.register_profile(
    "soak", max_examples=2000, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, rather than skip, GPU tests without a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    required = config.getoption("--require-gpu")
    if required and not marked:
        raise pytest.UsageError("--require-gpu: no GPU test was collected")
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    if required:
        raise pytest.UsageError(f"--require-gpu: {len(marked)} GPU tests and no CUDA device")
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
