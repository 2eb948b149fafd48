"""What GPU tests share."""

from __future__ import annotations

from typing import Any

import pytest

from mtserve.engine import core
from mtserve.restore.costs import Costs

# Of an H200 or so. To measure them takes a second for each shape of model, of which the tests have dozens.
TYPICAL = Costs(
    link=((65536, 40e9), (1 << 20, 50e9)), load_s=3e-5, batch_s=3e-4, layer_s=5e-6, row_s=1.5e-8, pair_s=5e-13,
    unpack_s=2e-9, plan_row_s=1e-8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def typical_costs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines believe in typical costs of restoring, but in tests marked `calibrates`."""
    if request.node.get_closest_marker("calibrates") is None:

        def typical(*arguments: Any, **options: Any) -> Costs:
            return TYPICAL

        monkeypatch.setattr(core, "known_costs", typical)
