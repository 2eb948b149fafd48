"""All configuration: frozen, validated on construction, each field with its unit and range.

One TOML file holds a table per class (`[engine]`, `[server]`, `[history]`); every field
is also a command-line flag (`engine.gpu_cache` is `--gpu-cache`). `option` records what
the command line needs to teach a field: help text, unit, range or choices.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mtserve.errors import InvalidArgument

C = TypeVar("C", bound="Config")


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    unit: str = "",
) -> Any:
    """A configuration field with the facts that validation and `--help` share."""
    facts = {"help": help, "low": low, "high": high, "choices": choices, "unit": unit}
    return field(default=default, metadata=facts)


class Config:
    """Base of the frozen configuration dataclasses: range checks and construction from tables."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            self._check(item, getattr(self, item.name))
        self.validate()

    def validate(self) -> None:
        """Checks that span fields; subclasses override."""

    def _check(self, item: dataclasses.Field[Any], value: Any) -> None:
        facts = item.metadata
        if not facts:
            return
        if not _fits(item.type, value):
            raise InvalidArgument(f"expected {item.type}, got {value!r}", field=item.name)
        if facts["choices"] and value not in facts["choices"]:
            raise InvalidArgument(f"{value!r} is not one of {', '.join(map(str, facts['choices']))}", field=item.name)
        low, high = facts["low"], facts["high"]
        if low is not None and not low <= value <= high:
            unit = f" {facts['unit']}" if facts["unit"] else ""
            raise InvalidArgument(f"{value} is outside {low} to {high}{unit}", field=item.name)

    @classmethod
    def from_table(cls: type[C], table: dict[str, Any]) -> C:
        """Build from a TOML table (or a dict of flags); unknown names are errors, not ignored."""
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(table) - known)
        if unknown:
            raise InvalidArgument(f"unknown field; known are {', '.join(sorted(known))}", field=unknown[0])
        return cls(**table)


def _fits(type_name: Any, value: Any) -> bool:
    accepted: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    if isinstance(value, bool):  # an int to Python, but not to whoever wrote it
        return bool(type_name == "bool")
    return type_name not in accepted or isinstance(value, accepted[type_name])


def read_toml(
    path: str | Path, tables: tuple[str, ...] = ("model", "engine", "server", "history")
) -> dict[str, dict[str, Any]]:
    """The configuration tables of a TOML file. Raises InvalidArgument on syntax or an unknown table."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidArgument(f"{path} does not exist", field="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}", field="config") from None
    for name, table in content.items():
        if name not in tables or not isinstance(table, dict):
            raise InvalidArgument(f"unknown table; known are {', '.join(tables)}", field=name)
    return {name: content.get(name, {}) for name in tables}


@dataclass(frozen=True)
class ModelConfig(Config):
    """Shape and semantics of one ranking model. All of it enters the model's fingerprint."""

    name: str = option("tiny", "name shown in reports")
    layers: int = option(2, "HSTU layers", low=1, high=128)
    d: int = option(32, "width of a token", low=8, high=16384)
    heads: int = option(2, "attention heads", low=1, high=128)
    head_dim: int = option(16, "width of a head", low=8, high=512)
    max_history: int = option(256, "behaviours kept (S + R)", low=2, high=1_000_000, unit="behaviours")
    max_realtime: int = option(
        32, "behaviours in R before they are folded into S", low=1, high=1_000_000, unit="behaviours"
    )
    history_low_water: float = option(0.75, "share of max_history kept by a re-cut", low=0.1, high=0.99)
    static_history: bool = option(True, "fold old behaviours into a static S; off: all behaviours are R")
    static_attention: str = option("full", "how U and S rows see each other", choices=("full", "causal"))
    norm: str = option("group", "affine parameters per token group, or shared (plain)", choices=("group", "plain"))
    gate_first: bool = option(False, "GLN(Y * u) instead of GLN(Y) * u")
    cross_features: bool = option(True, "use the candidates' user-item cross features")
    attention_length: int = option(256, "the constant n that attention weights are divided by", low=1, high=10_000_000)
    tasks: tuple[str, ...] = ("ctr", "ctcvr")

    def validate(self) -> None:
        if self.max_realtime > self.max_history:
            raise InvalidArgument(
                f"{self.max_realtime} is above max_history = {self.max_history}", field="max_realtime"
            )
        if not 1 <= len(self.tasks) <= 64 or len(set(self.tasks)) != len(self.tasks):
            raise InvalidArgument("needs 1 to 64 distinct names", field="tasks")
        object.__setattr__(self, "tasks", tuple(self.tasks))

    @property
    def state_values_per_token(self) -> int:
        """Values of K and V that one token takes over all layers."""
        return 2 * self.layers * self.heads * self.head_dim


@dataclass(frozen=True)
class EngineConfig(Config):
    """How an Engine caches, batches and computes."""

    device: str = option("auto", "where the model runs: auto, cpu, cuda or cuda:N (auto: cuda when there is one)")
    dtype: str = option(
        "auto",
        "type of weights and states (auto: float32 on cpu, bfloat16 on cuda)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kernels: str = option(
        "auto",
        "cuda: Hopper's matrix units; eager: plain torch; reference: the fp32 CPU truth (auto: cuda where it can)",
        choices=("auto", "cuda", "eager", "reference"),
    )
    graphs: str = option(
        "ahead",
        "capture a CUDA graph for each kind of batch (cuda kernels): ahead, the usual kinds at the start, which takes seconds, "
        "and others when they come often; on, all when they come often; off, none",
        choices=("ahead", "on", "off"),
    )
    deterministic: bool = option(
        False,
        "bit-equal scores from run to run and whoever else is in the batch, 5 to 25% slower (cuda kernels)",
    )
    cache: str = option("on", "off encodes every request's whole history again: the baseline", choices=("on", "off"))
    gpu_cache: str = option(
        "auto",
        "states on the device: bytes ('20GiB') or a share of its free memory ('50%'); auto: 60% on cuda, 1GiB on cpu",
    )
    host_cache: str = option(
        "1GiB", "states in host memory, pinned on cuda: bytes, or a share of available memory; 0 turns the tier off"
    )
    gpu_format: str = option(
        "native",
        "type of the states on the device: native, the model's; fp8, a byte a value (e4m3), of twice as many users, with "
        "scores that move a little (docs/restore.md); the host then keeps the same bytes, in host_format kv alone",
        choices=("native", "fp8"),
    )
    host_format: str = option(
        "kv",
        "what the host keeps of a page: kv, the states themselves; kv8, in int8; x8 or x4, what they are made from in "
        "int8 or int4, half to an eighth of the bytes. All but kv cost device memory for a packed twin of each page, and "
        "scores of restored users move a little (docs/restore.md)",
        choices=("kv", "kv8", "x8", "x4"),
    )
    restore: str = option(
        "auto",
        "how states that only the host has come back: load; recompute: never from the host; auto: by whichever is "
        "expected to be sooner, or the first layers by one and the rest by the other",
        choices=("auto", "load", "recompute"),
    )
    host_pinning: str = option(
        "background",
        "when host memory is pinned on cuda: while the server already serves, or before it does (wait)",
        choices=("background", "wait"),
    )
    write_back_idle_ms: int = option(
        100,
        "full pages are saved to the host at once; a partly filled one when its user has been idle for so long",
        low=0,
        high=3_600_000,
        unit="ms",
    )
    write_back_queue: str = option(
        "1GiB", "states on their way to the host at once; more wait on the device: bytes, or a share of gpu_cache"
    )
    copy_timeout_ms: int = option(
        30_000,
        "a copy between the tiers under way for so long is stuck: its user's states are encoded again",
        low=10,
        high=3_600_000,
        unit="ms",
    )
    page_tokens: int = option(64, "tokens of a page", low=1, high=1024, unit="tokens")
    policy: str = option(
        "lru",
        "which users lose their states first",
        choices=("lru", "sieve", "s3fifo", "arc", "gdsf", "wtinylfu", "locality"),
    )
    pin_budget: float = option(
        0.1,
        "share of each tier's pages that pinned users' states may keep from others, those used last first",
        low=0.0,
        high=0.5,
    )
    max_batch_tokens: int = option(
        16384, "new tokens of a batch (behaviours to encode + candidates)", low=1, high=10_000_000, unit="tokens"
    )
    cold_batch_tokens: int = option(8192, "of these, tokens of cold users", low=1, high=10_000_000, unit="tokens")
    cold_after: int = option(
        512, "a request with more tokens to encode counts as cold", low=1, high=10_000_000, unit="tokens"
    )
    max_batch_requests: int = option(64, "requests of a batch", low=1, high=65536)
    max_queue: int = option(4096, "requests waiting before new ones are refused", low=1, high=10_000_000)
    max_candidates: int = option(4096, "candidates of one request", low=1, high=1_000_000)
    default_deadline_ms: int = option(
        0, "deadline of requests that bring none; 0: none", low=0, high=3_600_000, unit="ms"
    )
    snapshot_cache: str = option(
        "256MiB", "recently used histories kept in memory: bytes, or a share of available memory"
    )
    chaos: str = option(
        "",
        "make copies between the tiers fail or come late, at random: 'fail=SHARE,slow=SHARE:TIME,pin=SHARE,seed=N' (tests)",
    )
    poison_pages: bool = option(False, "fill fresh and freed pages with NaN (tests)")

    def validate(self) -> None:
        if self.gpu_format == "fp8" and self.host_format != "kv":
            raise InvalidArgument(
                f"'fp8' keeps states as they are on the host (host_format = 'kv'), not in host_format = {self.host_format!r}",
                field="gpu_format",
            )


@dataclass(frozen=True)
class HistoryConfig(Config):
    """Where behaviours live. The only data here that is not derived from something else."""

    kind: str = option(
        "embedded", "embedded: durable files below `path`; memory: lost at exit", choices=("embedded", "memory")
    )
    path: str = option("mtserve-history", "folder of the embedded store")
    max_append: int = option(65536, "behaviours of one append", low=1, high=10_000_000, unit="behaviours")


@dataclass(frozen=True)
class ServerConfig(Config):
    """The gRPC front end."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(50051, "gRPC port; 0 picks a free one", low=0, high=65535)
    metrics_port: int = option(9400, "Prometheus port on the same address; 0 turns it off", low=0, high=65535)
    max_message_mib: int = option(16, "largest gRPC message", low=1, high=1024, unit="MiB")
    max_batch: int = option(256, "requests of one ScoreBatch", low=1, high=65536)
    drain_seconds: float = option(10.0, "how long SIGTERM lets running requests finish", low=0.0, high=3600.0, unit="s")
