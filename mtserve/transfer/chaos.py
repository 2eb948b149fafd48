"""Faults on demand: a seeded share of the copies between the tiers fails or takes longer."""

from __future__ import annotations

from random import Random

from mtserve.errors import InvalidArgument, TransferFailed
from mtserve.transfer.mover import LOAD, STORE
from mtserve.transfer.pinning import Pinning

FIELD = "chaos"
MAX_SLOW_S = 60.0
MAX_SEED = 2**31 - 1
UNITS = {"ms": 0.001, "s": 1.0}  # a duration is tried with each in turn: "ms" ends in "s"


class Chaos:
    """A `Fault` that fails copies at random, and the time by which others are late.

    The n-th load and the n-th store meet the same fate in every run with the same seed, whatever their order.
    """

    def __init__(
        self, *, fail: float = 0.0, slow: float = 0.0, slow_s: float = 0.0, pin: float = 0.0, seed: int = 0
    ) -> None:
        """`fail`, `slow`: shares of the copies, 0 to 1; `slow_s`: how much longer a slow one takes, in seconds.
        `pin`: share of the chunks of host memory that cannot be pinned.

        Raises InvalidArgument for what is out of range.
        """
        _check("fail", fail, 0, 1)
        _check("slow", slow, 0, 1)
        _check("the time of slow", slow_s, 0, MAX_SLOW_S, " s")
        _check("pin", pin, 0, 1)
        _check("seed", seed, 0, MAX_SEED)
        self.fail, self.slow, self.slow_s, self.pin, self.seed = fail, slow, slow_s, pin, seed
        self._fates = {kind: Random(f"{seed} fail {kind}") for kind in (LOAD, STORE)}
        self._delays = {kind: Random(f"{seed} slow {kind}") for kind in (LOAD, STORE)}

    @classmethod
    def parse(cls, text: str) -> Chaos:
        """The chaos meant by "fail=0.05,slow=0.02:20ms,pin=0.1,seed=7"; what is not named is 0.

        `slow` is a share and a time in ms or s. Raises InvalidArgument saying what is wrong.
        """
        facts: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or name not in ("fail", "slow", "pin", "seed"):
                raise InvalidArgument(f"{part!r} is not fail=SHARE, slow=SHARE:TIME, pin=SHARE or seed=N", field=FIELD)
            if name in facts:
                raise InvalidArgument(f"{name} is given twice", field=FIELD)
            facts[name] = value
        if not facts.keys() & {"fail", "slow", "pin"}:
            raise InvalidArgument(f"{text!r} has none of fail, slow and pin", field=FIELD)
        share, _, time = facts.get("slow", "0:0s").partition(":")
        return cls(
            fail=_number("fail", facts.get("fail", "0")),
            slow=_number("slow", share),
            slow_s=_seconds(time),
            pin=_number("pin", facts.get("pin", "0")),
            seed=_integer("seed", facts.get("seed", "0")),
        )

    def __call__(self, kind: str) -> None:
        """Raise TransferFailed where the next copy of `kind` is to fail."""
        if self._fates[kind].random() < self.fail:
            raise TransferFailed(f"{kind}: failed on purpose (fail={self.fail:g})", field=FIELD)

    def delay(self, kind: str) -> float:
        """Seconds by which the next copy of `kind` ends late; mostly 0."""
        return self.slow_s if self._delays[kind].random() < self.slow else 0.0


class ChaosPinning:
    """A `Pinning` that fails at random, before it has pinned anything. What it does not fail is pinned where it must be."""

    def __init__(self, chaos: Chaos, inner: Pinning | None) -> None:
        self._share, self._inner = chaos.pin, inner
        self._fates = Random(f"{chaos.seed} pin")

    def pin(self, address: int, size: int) -> None:
        if self._fates.random() < self._share:
            raise TransferFailed(f"pinning failed on purpose (pin={self._share:g})", field=FIELD)
        if self._inner is not None:
            self._inner.pin(address, size)

    def unpin(self, address: int) -> None:
        if self._inner is not None:
            self._inner.unpin(address)


def _check(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    if not low <= value <= high:
        raise InvalidArgument(f"{name} {value:g} is outside {low:g} to {high:.10g}{unit}", field=FIELD)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidArgument(f"{name} {text!r} is not a number", field=FIELD) from None


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(f"{name} {text!r} is not an integer", field=FIELD) from None


def _seconds(text: str) -> float:
    for unit, seconds in UNITS.items():
        if text.endswith(unit):
            return _number("the time of slow", text.removesuffix(unit)) * seconds
    raise InvalidArgument(f"the time of slow {text!r} is not such as 20ms or 0.5s", field=FIELD)
