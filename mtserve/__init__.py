"""mtserve: a serving runtime for generative recommenders with cached user states."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtserve.config import EngineConfig, ModelConfig
    from mtserve.engine.engine import Engine
    from mtserve.model.ranking import RankingModel
    from mtserve.types import Request, ScoreResult

__version__ = "0.1.0"

# Importing `mtserve` alone must stay cheap (the CLI's --help, a client without torch),
# so what needs torch is imported when it is first named.
_HOMES = {
    "Engine": "mtserve.engine.engine",
    "EngineConfig": "mtserve.config",
    "ModelConfig": "mtserve.config",
    "RankingModel": "mtserve.model.ranking",
    "Request": "mtserve.types",
    "ScoreResult": "mtserve.types",
}
__all__ = ["Engine", "EngineConfig", "ModelConfig", "RankingModel", "Request", "ScoreResult", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mtserve' has no attribute {name!r}")
