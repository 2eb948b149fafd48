"""Every knob of the trace generator."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from mtserve.config import Config, option
from mtserve.errors import InvalidArgument
from mtserve.trace.calendar import DAY_MS
from mtserve.trace.calibration import ACTIVITY_SIGMA, HISTORY_SIGMA, KUAIRAND
from mtserve.trace.generator.attendance import MAX_USER_DAYS
from mtserve.trace.generator.bursts import MAX_DAYS as MOST_BURST_DAYS
from mtserve.trace.generator.bursts import BurstConfig
from mtserve.trace.generator.clock import WeekConfig
from mtserve.trace.generator.crowds import CrowdConfig
from mtserve.trace.generator.groups import UserGroup, groups_text, parse_groups
from mtserve.trace.generator.launches import LaunchConfig
from mtserve.trace.generator.newcomers import NewcomerConfig
from mtserve.trace.generator.tastes import click_rates

MAX_REQUESTS = 1_000_000_000
PARTS: dict[str, type[Config]] = {
    "week": WeekConfig,
    "bursts": BurstConfig,
    "crowds": CrowdConfig,
    "newcomers": NewcomerConfig,
    "launches": LaunchConfig,
}
"""Knobs in classes of their own, by the name of their field and TOML table."""


@dataclass(frozen=True)
class GeneratorConfig(Config):
    """Every knob of the generator; defaults are the published figures where there is one."""

    name: str = option("synthetic", "name shown in reports")
    seed: int = option(0, "seed of everything drawn", low=0, high=2**63 - 1)
    users: int = option(200, "users", low=1, high=50_000_000)
    requests: int = option(2_000, "requests of all users together", low=0, high=MAX_REQUESTS)
    days: int = option(7, "length of the trace", low=1, high=3_650, unit="days")
    start_ms: int = option(
        1_700_006_400_000, "midnight at which the trace starts", low=0, high=10**14, unit="ms since the epoch"
    )
    activity_sigma: float = option(
        ACTIVITY_SIGMA, "sigma of the lognormal of requests per user; 0: all alike", low=0.0, high=3.0
    )
    long_gap_hours: float = option(8.0, "mean of the gaps of 2 h or more", low=2.1, high=720.0, unit="h")
    history_median: int = option(
        KUAIRAND["clicks_per_user"]["p50"],
        "median length of the histories before the trace; 0: none",
        low=0,
        high=1_000_000,
        unit="behaviours",
    )
    history_sigma: float = option(HISTORY_SIGMA, "sigma of the lognormal of history lengths", low=0.0, high=3.0)
    history_max: int = option(20_000, "longest history before the trace", low=0, high=1_000_000, unit="behaviours")
    history_days: int = option(31, "how far back histories reach", low=1, high=3_650, unit="days")
    history_activity: float = option(
        0.8, "correlation of history length and activity, both in the log", low=-1.0, high=1.0
    )
    candidates_mean: float = option(KUAIRAND["candidates_mean"], "mean candidates of a request", low=1.0, high=4096.0)
    candidates_spread: str = option(
        "geometric", "geometric, or fixed: candidates_mean of them always", choices=("geometric", "fixed")
    )
    clicks_mean: float = option(KUAIRAND["clicks_mean"], "mean clicks of a request", low=0.0, high=4096.0)
    items: int = option(100_000, "items there are", low=2, high=1_000_000_000)
    categories: int = option(50, "categories they fall into", low=1, high=1_000_000)
    popularity_exponent: float = option(1.0, "exponent of the items' Zipf law", low=0.0, high=3.0)
    taste: float = option(0.6, "share of candidates from the user's favourite categories", low=0.0, high=1.0)
    taste_lift: float = option(1.3, "how much likelier than average such a candidate is clicked", low=0.0, high=100.0)
    groups: str = option("", "groups of users with habits of their own, as 'heavy casual:share=0.6,gap=2'")
    week: WeekConfig = field(default_factory=WeekConfig)
    bursts: BurstConfig = field(default_factory=BurstConfig)
    crowds: CrowdConfig = field(default_factory=CrowdConfig)
    newcomers: NewcomerConfig = field(default_factory=NewcomerConfig)
    launches: LaunchConfig = field(default_factory=LaunchConfig)

    def validate(self) -> None:
        if self.categories > self.items:
            raise InvalidArgument(f"{self.categories} is above items = {self.items}", field="categories")
        if self.candidates_mean * 2 > self.items:
            raise InvalidArgument(
                f"{self.candidates_mean} is above half of items = {self.items}", field="candidates_mean"
            )
        if self.clicks_mean > self.candidates_mean:
            raise InvalidArgument(
                f"{self.clicks_mean} is above candidates_mean = {self.candidates_mean}", field="clicks_mean"
            )
        if self.start_ms % DAY_MS or self.start_ms < self.history_days * DAY_MS:
            raise InvalidArgument("must be a midnight (UTC) at least history_days after the epoch", field="start_ms")
        self._validate_parts()

    def _validate_parts(self) -> None:
        parse_groups(self.groups)
        if self.bursts.levels and self.days > MOST_BURST_DAYS:
            raise InvalidArgument(f"{self.days} is above {MOST_BURST_DAYS} with bursts", field="days")
        if self.newcomers.over_days > self.days:
            raise InvalidArgument(
                f"{self.newcomers.over_days} is above days = {self.days}", field="newcomers.over_days"
            )
        if self.week.weekend != 1 and self.users * self.days > MAX_USER_DAYS:
            raise InvalidArgument(f"needs users * days of at most {MAX_USER_DAYS:,}", field="week.weekend")
        total = self.requests + self.crowds.events * self.crowds.requests(self.requests, self.days)
        if total > MAX_REQUESTS:
            raise InvalidArgument(f"makes {total:,} requests, above {MAX_REQUESTS:,}", field="crowds.load")

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> Self:
        """Build from a TOML table, in which `PARTS` and `groups` may be tables. Raises InvalidArgument."""
        values = dict(table)
        if isinstance(values.get("groups"), dict):
            values["groups"] = groups_text(values["groups"])
        for name in PARTS.keys() & values.keys():
            values[name] = _part(name, values[name])
        return super().from_table(values)

    def facts(self) -> dict[str, int | float | str | bool]:
        """Every knob by name, flat; of `PARTS` and `groups` those that are in use."""
        facts = {name: value for name, value in asdict(self).items() if name not in PARTS}
        if not self.groups:
            del facts["groups"]
        for name, part in PARTS.items():
            if getattr(self, name) != part():
                facts |= {f"{name}.{key}": value for key, value in asdict(getattr(self, name)).items()}
        return facts

    @property
    def user_groups(self) -> dict[str, UserGroup]:
        """The groups by name."""
        return parse_groups(self.groups)

    @property
    def click_rate(self) -> float:
        """Share of candidates that are clicked."""
        return self.clicks_mean / self.candidates_mean

    @property
    def click_rates(self) -> tuple[float, float]:
        """Share clicked of candidates (outside, inside) the user's favourites; the mean is `click_rate`."""
        return click_rates(self.click_rate, self.taste, self.taste_lift)


def _part(name: str, table: Any) -> Config:
    if not isinstance(table, dict):
        raise InvalidArgument("expected a table", field=name)
    try:
        return PARTS[name].from_table(table)
    except InvalidArgument as error:
        raise InvalidArgument(str(error).removeprefix(f"{error.field}: "), field=f"{name}.{error.field}") from None
