"""How much memory the states of a trace's users take, and capacities stated as shares of it."""

from __future__ import annotations

import math
import re

from mtserve.config import ModelConfig
from mtserve.errors import InvalidArgument
from mtserve.model.cut import cut_history
from mtserve.trace.schema import Ints, SmallInts

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%\s*ws")
MAX_SHARE = 10_000


def working_set_pages(user: SmallInts, positions: Ints, model: ModelConfig, user_tokens: int, page_tokens: int) -> int:
    """Pages that hold the states of every user who asks, at the end of the trace.

    user: int32 [N] user of each request; positions: int64 [U] behaviours of each user at the end;
    user_tokens: U features of the model. Users without a request never have states.
    """
    asking = sorted(set(user.tolist()))
    prefixes = (user_tokens + cut_history(int(positions[index]), model).kept for index in asking)
    return sum(-(-prefix // page_tokens) for prefix in prefixes)


def resolve_capacity(text: str, working_set_pages: int, page_bytes: int, field: str) -> str:
    """`text` as `EngineConfig` takes it: "25%ws" becomes bytes, in whole pages and at least one; all else stays."""
    match = _SHARE.fullmatch(text.strip())
    if match is None:
        return text
    share = float(match[1])
    if share > MAX_SHARE:
        raise InvalidArgument(f"{text!r} is outside 0 to {MAX_SHARE}%ws", field=field)
    if share == 0:
        return "0"
    pages = max(1, math.ceil(working_set_pages * share / 100))
    return str(pages * page_bytes)
