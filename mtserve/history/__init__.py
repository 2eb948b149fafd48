"""Behaviour store: users' features and behaviours, durable before they are acknowledged."""

from __future__ import annotations

from mtserve.history.open import open_history
from mtserve.history.store import Append, HistoryStore

__all__ = ["Append", "HistoryStore", "open_history"]
