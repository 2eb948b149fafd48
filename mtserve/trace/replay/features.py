"""From a trace's columns to the feature rows of a model: the adapter that replay runs on.

A trace knows item, action and time. What a model's schema asks beyond that is filled so that
the same trace always gives the same rows:

    item       the trace's item id; every model replayed must have it for behaviours and candidates
    category   `splitmix64(item) % CATEGORIES`
    action     the trace's action, for behaviours
    U features of a user: a hash of user id and feature name; a dense one lies in [0, 1)
    all else   0

Names the schema lacks are left out.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.errors import InvalidArgument
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.trace.schema import Ints, SmallInts, Trace, TraceRequest
from mtserve.types import History, Rows

CATEGORIES = 1000


def splitmix64(values: Ints) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: a stable mix of each int64."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def categories(items: Ints) -> npt.NDArray[np.uint64]:
    """[n] of these items, below CATEGORIES."""
    return splitmix64(items) % np.uint64(CATEGORIES)


class TraceRows:
    """Rows of one trace in one model's schema. Raises InvalidArgument when that has no categorical `item`."""

    def __init__(self, trace: Trace, schema: FeatureSchema) -> None:
        for group in ("behaviour", "candidate"):
            features = {feature.name: feature for feature in getattr(schema, group)}
            if "item" not in features or features["item"].kind != "categorical":
                raise InvalidArgument(
                    f"a trace can drive only models with a categorical {group} feature named 'item'; "
                    f"this one has {', '.join(features)}",
                    field="model",
                )
        self.trace, self.schema = trace, schema
        self._behaviour = {feature.name: feature for feature in schema.behaviour}
        self._candidate = {feature.name: feature for feature in schema.candidate}
        # Of all that requests bring at once: what a client takes for each is taken from the engine beside it.
        self._candidate_categories, self._clicked_categories = (
            categories(items).astype(np.uint16) for items in (trace.cand_items, trace.clicked_items)
        )
        # Requests of each user in trace order, so that a history can be told as of any request.
        self._by_user = np.argsort(trace.user, kind="stable")
        self._user_ends = np.searchsorted(trace.user[self._by_user], np.arange(trace.users + 1))

    def user(self, user_index: int) -> Rows:
        """[1] row of U features of one user."""
        user_id = self.trace.user_ids[user_index]
        return self.schema.user_row({feature.name: _user_value(user_id, feature) for feature in self.schema.user})

    def history(self, user_index: int) -> Rows:
        """[n] behaviours that a user had before the trace."""
        past = self.trace.history(user_index)
        return self._behaviours(past.items, past.t_ms, past.actions, categories(past.items))

    def candidates(self, request: TraceRequest) -> Rows:
        """[n] candidate rows, exposed at the request's time."""
        first = self.trace.cand_offsets[request.number]
        of_each = self._candidate_categories[first : first + len(request.cand)]
        return self._rows(self.schema.candidate_dtype, self._candidate, request.cand, request.t_ms, None, of_each)

    def clicked(self, request: TraceRequest) -> Rows:
        """[n] behaviours that the request became."""
        first = self.trace.clicked_offsets[request.number]
        of_each = self._clicked_categories[first : first + len(request.clicked)]
        return self._behaviours(request.clicked, request.t_ms, request.actions, of_each)

    def history_at(self, request_index: int) -> History:
        """The whole history that the request's user has when it comes: the truth a replay must have reached."""
        user = int(self.trace.user[request_index])
        own = self._by_user[self._user_ends[user] : self._user_ends[user + 1]]
        earlier = own[: np.searchsorted(own, request_index)]
        parts = [self.history(user), *(self.clicked(self.trace.request(int(index))) for index in earlier)]
        return History(self.user(user), 0, np.concatenate(parts))

    def final_positions(self) -> Ints:
        """[U] behaviours of each user at the end of the trace."""
        clicks = np.bincount(self.trace.user, weights=self.trace.clicked_lengths, minlength=self.trace.users)
        return self.trace.history_lengths + clicks.astype(np.int64)

    def _behaviours(self, items: Ints, t_ms: Ints | int, actions: SmallInts, of_each: npt.NDArray[Any]) -> Rows:
        return self._rows(self.schema.behaviour_dtype, self._behaviour, items, t_ms, actions, of_each)

    def _rows(
        self,
        dtype: np.dtype[np.void],
        features: dict[str, Feature],
        items: Ints,
        t_ms: Ints | int,
        actions: SmallInts | None,
        of_each: npt.NDArray[Any],
    ) -> Rows:
        """`of_each`: the items' categories."""
        rows = np.zeros(len(items), dtype=dtype)
        rows["time_ms"] = t_ms
        rows["item"] = items
        if "category" in features and features["category"].kind == "categorical":
            rows["category"] = of_each
        if actions is not None and "action" in features and features["action"].kind == "categorical":
            rows["action"] = actions
        return rows


def _user_value(user_id: str, feature: Feature) -> Any:
    digest = hashlib.blake2b(f"{feature.name}\0{user_id}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    if feature.kind == "categorical":
        return value >> 1
    return np.random.default_rng(value).random(feature.width, dtype=np.float32)
