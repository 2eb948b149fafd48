"""What a request must be before anything is done for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtserve.errors import InvalidArgument
from mtserve.history.store import check_user_id
from mtserve.model.schema import FeatureSchema
from mtserve.types import History, Request, Rows

MAX_PINS = 65536  # users of one call


def check_pins(user_ids: Sequence[str]) -> None:
    """Raise InvalidArgument unless these are at most MAX_PINS user ids."""
    if isinstance(user_ids, str):
        raise InvalidArgument("expected a list of user ids, got one", field="user_ids")
    if len(user_ids) > MAX_PINS:
        raise InvalidArgument(f"{len(user_ids)} users are above the limit of {MAX_PINS}", field="user_ids")
    for user_id in user_ids:
        check_user_id(user_id)


def check_request(request: Request, schema: FeatureSchema, max_candidates: int) -> None:
    """Raise InvalidArgument, naming the field, unless `request` is one of this schema and within its limits."""
    check_user_id(request.user_id)
    _check_candidates(request.candidates, schema, max_candidates)
    if request.history is not None:
        _check_history(request.history, schema)


def _check_candidates(candidates: Rows, schema: FeatureSchema, limit: int) -> None:
    if not isinstance(candidates, np.ndarray) or candidates.dtype != schema.candidate_dtype or candidates.ndim != 1:
        raise InvalidArgument("rows are not of this model's candidate schema", field="candidates")
    if not 1 <= len(candidates) <= limit:
        raise InvalidArgument(
            f"{len(candidates)} candidates are outside 1 to max_candidates = {limit}", field="candidates"
        )


def _check_history(history: History, schema: FeatureSchema) -> None:
    schema.check_behaviours(history.behaviours, field="history")
    features = history.features
    if features is not None and (features.dtype != schema.user_dtype or features.shape != (1,)):
        raise InvalidArgument("expected one row of this model's user features", field="history.features")
    if history.first < 0:
        raise InvalidArgument(f"{history.first} is below 0", field="history.first")
