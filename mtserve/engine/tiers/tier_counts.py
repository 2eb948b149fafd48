"""What the tiers hold, as metrics and as facts."""

from __future__ import annotations

from typing import Any

from mtserve.cache.index import IndexStats, TieredIndex
from mtserve.engine.tiers.footprint import Footprint
from mtserve.metrics import Metrics


class TierCounts:
    """Brings the metrics of pages up to date with the index."""

    def __init__(self, index: TieredIndex, metrics: Metrics, footprint: Footprint) -> None:
        self._index, self._metrics, self._footprint = index, metrics, footprint
        self.host_pages = 0  # that the host tier has
        self._counted = {"gpu": 0, "host": 0, "unsaved": 0, "declined": 0}  # evictions; stores

    def update(self) -> IndexStats:
        """Set the gauges, count what was evicted since the last call."""
        stats = self._index.stats()
        self.host_pages = stats.host.total
        for name, tier in (("gpu", stats.gpu), ("host", stats.host)):
            self._metrics.set("pages_capacity", tier.total, name)
            self._metrics.set("pages_in_use", tier.used, name)
            self._metrics.set("pinned_users", tier.pinned_users, name)
            self._metrics.set("pinned_pages", tier.pinned_pages, name)
            self._count("evicted_pages_total", name, tier.evicted_pages, name)
        self._count("evicted_unsaved_pages_total", "unsaved", stats.unsaved_pages)
        self._count("stores_declined_total", "declined", stats.declined_stores)
        return stats

    def _count(self, metric: str, key: str, total: int, label: str = "") -> None:
        if total > self._counted[key]:
            self._metrics.count(metric, total - self._counted[key], label)
            self._counted[key] = total

    def facts(self) -> dict[str, Any]:
        """Pages and bytes of each tier, JSON-able."""
        stats = self.update()
        tiers = {}
        page_bytes = self._footprint
        for name, tier, size in (("gpu", stats.gpu, page_bytes.gpu), ("host", stats.host, page_bytes.host)):
            tiers[name] = {
                "pages": {"total": tier.total, "used": tier.used, "in_flight": tier.in_flight, "free": tier.free},
                "page_bytes": size,
                "capacity_bytes": tier.total * size,
                "used_bytes": tier.used * size,
                "users": tier.users,
                "evicted_pages": tier.evicted_pages,
                "pinned_users": tier.pinned_users,
                "pinned_pages": tier.pinned_pages,
            }
        return tiers
