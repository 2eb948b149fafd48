"""The C++ core: the tiered index, what plans a batch, a simulation of the tiers, and host memory. Names with an
underscore are reached through the modules that document them: `mtserve.cache.index`, `mtserve.kernels.attention.work`, `mtserve.engine.forward.planner`.

Every function raises `mtserve.errors.InvalidArgument` on a malformed argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.types import Chain

class Match:
    """Tokens of a chain's prefix that each tier holds."""

    def __init__(self, gpu_tokens: int, host_tokens: int) -> None: ...
    @property
    def gpu_tokens(self) -> int: ...
    @property
    def host_tokens(self) -> int: ...
    def __hash__(self) -> int: ...

class Presence:
    """A match, and whether a load or a batch that may change it is under way."""

    @property
    def gpu_tokens(self) -> int: ...
    @property
    def host_tokens(self) -> int: ...
    @property
    def arriving_tokens(self) -> int: ...
    @property
    def loading(self) -> bool: ...
    @property
    def in_batch(self) -> bool: ...

_Copy = tuple[int, bytes, bytes, int, int]  # ticket, gpu pages, host pages, first token, tokens
_Tier = tuple[int, int, int, int, int, int, int, int, int]  # the fields of mtserve.cache.index.TierStats

class Index:
    def __init__(
        self, page_tokens: int, gpu_pages: int, host_pages: int, policy: str, track_freed: bool, pin_budget: float
    ) -> None: ...
    @property
    def page_tokens(self) -> int: ...
    def lookup(self, user: str, chain: Chain) -> Match: ...
    def survey(self, users: Sequence[str], chains: Sequence[Chain]) -> list[Presence]: ...
    def _busy(self, user: str) -> tuple[bool, bool, bool]: ...
    def _begin_batch(
        self,
        users: Sequence[str],
        chains: Sequence[Chain],
        cached: npt.NDArray[np.int32],
        stored: npt.NDArray[np.int32],
        page_table: npt.NDArray[np.int32],
        again: Sequence[bool],
        now: float,
    ) -> int: ...
    def end_batch(self, ticket: int, success: bool) -> list[str]: ...
    def _begin_loads(self, users: Sequence[str], chains: Sequence[Chain], now: float) -> list[_Copy | None]: ...
    def end_load(self, ticket: int, success: bool) -> None: ...
    def _begin_stores(self, users: Sequence[str], tail: bool, pages: int, now: float) -> list[_Copy | None]: ...
    def unsaved_tokens(self, user: str) -> int: ...
    def grow_host(self, pages: int) -> None: ...
    def end_store(self, ticket: int, success: bool) -> None: ...
    def set_window(self, users: Sequence[str]) -> None: ...
    def pin(self, users: Sequence[str]) -> int: ...
    def unpin(self, users: Sequence[str]) -> int: ...
    def invalidate(self, user: str) -> bool: ...
    def invalidate_all(self) -> int: ...
    def users(self) -> list[tuple[str, int, int]]: ...
    def _stats(self) -> tuple[_Tier, _Tier, int, int, int, int, int, int, int, int, int, int]: ...
    def _drain_freed(self, tier: str) -> bytes: ...
    def drain_returns(self) -> list[float]: ...
    def check(self) -> None: ...
    def _sabotage(self, what: str) -> None: ...

def policy_names() -> list[str]: ...
def oracle_policy_names() -> list[str]:
    """Policies that know what comes: others are measured against them, they cannot serve."""

class _TraceOracle:
    """What a finished trace tells of users by `keys`, uint64 [requests], at `t_s`, float64 [requests], ascending seconds."""

    def __init__(self, keys: npt.NDArray[np.uint64], t_s: npt.NDArray[np.float64]) -> None: ...

class _Policy:
    """A replacement policy by itself, without an index, for a tier of `capacity_pages` pages: for tests and benchmarks.

    A slot, below 2^27, stands for an entry; `key` for its user, whom the policy may remember when the entry is gone;
    `now` are seconds on any clock. InvalidArgument where the policy is one of `oracle_policy_names` and has no oracle.
    """

    def __init__(self, name: str, capacity_pages: int, oracle: _TraceOracle | None = None) -> None: ...
    def insert(self, slot: int, key: int, pages: int, now: float = 0, cost: float = 1) -> None:
        """`cost` of bringing a page back, above 0, beside that of others."""

    def access(self, slot: int, now: float = 0) -> None: ...
    def refresh(self, slot: int, now: float = 0) -> None:
        """As recent as if accessed, but no more frequent."""

    def resize(self, slot: int, pages: int) -> None: ...
    def remove(self, slot: int, evicted: bool) -> None:
        """`evicted`: to make room, as opposed to states that became void."""

    def hold(self, slot: int) -> None:
        """Not to be chosen before `release`."""

    def release(self, slot: int) -> None: ...
    def admits(self, key: int, pages: int, victim: int) -> bool:
        """Whether a newcomer is worth more than `victim`."""

    def decline(self, key: int, pages: int) -> None:
        """A request of a user who is not let in."""

    @property
    def looks(self) -> int:
        """Entries that all calls of `victim` have looked at."""

    def victim(self, pinned: Sequence[int] = (), now: float = 0) -> int | None:
        """The slot to take from next, still listed; None when all are pinned."""

    def grow(self, pages: int) -> None: ...
    def replay(
        self,
        users: npt.NDArray[np.int32],
        pages: npt.NDArray[np.int32],
        recent: int = 0,
        start_s: float = 0,
        every_s: float = 0,
    ) -> int:
        """Hits of requests for `users` int32 [requests], each of `pages[user]` pages, int32 [users].

        Whole users are evicted. Those of the last `recent` requests, at most 1024, are pinned; who finds no room is
        not kept. A request comes `every_s` seconds after the other. FailedPrecondition when entries came or went by
        other calls.
        """

    def contains(self, slot: int) -> bool: ...
    def __len__(self) -> int: ...
    @property
    def pages(self) -> int: ...
    def check(self) -> None: ...

def _replay_trace(
    name: str,
    capacity_pages: int,
    users: npt.NDArray[np.int32],
    t_s: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.int32],
    found: npt.NDArray[np.int32],
    known: int,
    page_tokens: int,
) -> None:
    """What a trace finds on one tier under a policy, also one that knows what comes: `found` int32 [requests], in tokens.

    `users` int32 [requests] are numbers below `known`, `t_s` float64 [requests] ascending seconds, `tokens` int32
    [requests] the prefix that the request wants and leaves behind. Users are evicted from the end, page by page of
    `page_tokens`; the policy is checked at the end (CorruptState).
    """

def _optimum(
    capacity_pages: int,
    users: npt.NDArray[np.int32],
    t_s: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.int32],
    found: npt.NDArray[np.int32],
    known: int,
    page_tokens: int,
) -> None:
    """As `_replay_trace`, under the choice that finds the most pages of all, which may also keep nothing of a request."""

_SimulatedTier = tuple[int, int, int, int, int, int, int]  # the fields of mtserve.trace.simulate.run.TierCounters

class _Simulation:
    """The tiers of an engine with counts for states; see mtserve/trace/simulate/run.py and csrc/simulate/simulation.h."""

    def __init__(
        self,
        page_tokens: int,
        gpu_pages: int,
        host_pages: int,
        policy: str,
        batch_tokens: int,
        cold_batch_tokens: int,
        cold_after: int,
        pin_budget: float,
        users: int,
        keys: npt.NDArray[np.uint64] | None,
        habits: _TraceOracle | None,
    ) -> None:
        """`habits`: for the policies of `oracle_policy_names`, of users by number; `keys` are None then."""

    def pin(self, users: npt.NDArray[np.int32]) -> int:
        """Keep the states of these users, [n], before others'; returns how many were not pinned. As `TieredIndex.pin`."""

    def run(
        self,
        t_s: npt.NDArray[np.float64],
        columns: Sequence[npt.NDArray[np.int32]],
        gpu_tokens: npt.NDArray[np.int32],
        host_tokens: npt.NDArray[np.int32],
        next_s: npt.NDArray[np.float64] | None,
    ) -> None:
        """The next N requests, [N] each; gpu_tokens and host_tokens are written. InvalidArgument, and no change, for what is no request.

        `columns`: users, candidates, tokens, generations, frozen, tokens_after, generations_after and frozen_after.
        `next_s`, needed with `habits`: when each user asks next for the states that its request leaves, else infinity.
        """

    def stats(self) -> tuple[_SimulatedTier, _SimulatedTier, int, int, int, int, int, int, int, int]: ...
    def check(self) -> None: ...

class PageAllocator:
    """Free page ids of one tier, given out in runs of neighbours: O(1) a page."""

    def __init__(self, pages: int, track_freed: bool = False) -> None: ...
    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...
    def is_free(self, page: int) -> bool: ...
    def take(self, count: int, held: Sequence[int] = ()) -> list[int]:
        """min(count, free) pages for the owner of `held`, which are in the order of its history."""

    def grow(self, pages: int) -> None: ...
    def release(self, page: int) -> None:
        """Raises CorruptState when the page is free already."""

    def _drain_freed(self) -> bytes: ...
    def check(self) -> None: ...

def digest(data: bytes, seed: int = 0) -> int: ...
def extend_chain(chain_out: Chain, rows: npt.NDArray[Any], seed: int) -> None: ...
def _plan_attention_work(
    slots: npt.NDArray[np.int32],
    limits: npt.NDArray[np.int32],
    heads: int,
    head_dim: int,
    sms: int,
    deterministic: bool,
    out_work: npt.NDArray[np.int32],
    out_splits: npt.NDArray[np.int32],
    pieces: int,
    tile_rows: int,
) -> tuple[int, int, int]: ...

class _GapBuckets:
    """Which bucket gaps fall into, as mtserve.model.tokeniser.gap_buckets has it for the same thresholds."""

    def __init__(self, gap_thresholds: npt.NDArray[np.int64]) -> None: ...
    def find(self, gaps: npt.NDArray[np.int64], out: npt.NDArray[np.int32]) -> None: ...

class _BatchLayout:
    """Lays batches out; `mtserve.engine.forward.batch.BatchArrays` says what it writes."""

    def __init__(
        self,
        users: int,
        user_bytes: int,
        behaviour_bytes: int,
        candidate_bytes: int,
        page_tokens: int,
        tile_tokens: int,
        full_attention: bool,
        plain_norm: bool,
        gap_thresholds: npt.NDArray[np.int64],
        rows_of_part: int,
    ) -> None: ...
    def plan(
        self,
        spans: Sequence[int],  # cached, encode_to, frozen, stored, jobs of each slot
        features: Sequence[npt.NDArray[np.void]],
        kept: Sequence[npt.NDArray[np.void]],
        candidates: Sequence[npt.NDArray[np.void]],
        limits: Sequence[npt.NDArray[np.int32]],
        recency: Sequence[npt.NDArray[np.int32]],
        page_table: npt.NDArray[np.int32] | None,
        out: Sequence[npt.NDArray[Any]],
    ) -> tuple[int, tuple[int, ...]]:
        """The tiles used and the first token of each kind, and of a kind behind the last."""

def _find_runs(left: npt.NDArray[np.int32], right: npt.NDArray[np.int32], boundary: int) -> bytes:
    """int64 [3, runs]: left firsts, right firsts, counts."""

def _count_runs(left: Sequence[npt.NDArray[np.int32]], right: Sequence[npt.NDArray[np.int32]], boundary: int) -> int:
    """How many there are in the arrays' pages, one array behind the other."""

class _RestoreCosts:
    """What restoring costs; see mtserve/restore/costs.py."""

    def __init__(
        self,
        link: Sequence[tuple[int, float]],
        load_s: float,
        batch_s: float,
        layer_s: float,
        row_s: float,
        pair_s: float,
        unpack_s: float,
        plan_row_s: float,
    ) -> None: ...
    def compute_s(self, rows: int, pairs: int) -> float: ...
    def bytes_per_s(self, piece: int) -> float: ...

def _restore_ends(
    costs: _RestoreCosts,
    layers: int,
    page_tokens: int,
    layer_bytes: int,
    groups: Sequence[int],
    run_pages: float,
    grouped: float,
    parts: int,
    needs: list[int],
    rows: int,
    pairs: int,
    link_busy_s: float,
) -> list[float]:
    """Seconds to the end of a batch's last layer if layers from k on are loaded, for k from 0 to `layers`.

    `needs`: prefix, cached, host, candidates and frozen of each, as in mtserve.restore.choice.Need.
    """

class _PageLink:
    """Two pools of equal pages, at addresses: `layers` of `layer_bytes` each side by side.

    `chunk_pages`: no copy crosses a multiple of so many pages of the arena; 0: any may. `strided_bytes`: of a run of pages,
    in the mean, from which on some of its layers are copied by one strided copy.
    """

    def __init__(
        self,
        pool: int,
        pool_pages: int,
        arena: int,
        arena_pages: int,
        layers: int,
        layer_bytes: int,
        chunk_pages: int,
        strided_bytes: int,
    ) -> None: ...

class _PageKernel:
    """A kernel that works on listed pages and a range of layers; `parameters` are the values of what it takes.

    Number `paged` of them is a struct with int32 fields, at the offsets `fields`: first layer, last, number of pages, and
    the ids of up to `most_pages`. A launch has `column_tiles` blocks for each layer and `tile_pages` pages, at most
    `most_blocks` (0: any number).
    """

    def __init__(
        self,
        function: int,
        threads: int,
        shared_bytes: int,
        parameters: list[bytes],
        paged: int,
        fields: list[int],
        most_pages: int,
        tile_pages: int,
        column_tiles: int,
        most_blocks: int,
    ) -> None: ...

class _DriverQueue:
    """Calls of the CUDA driver made by a thread of its own; see mtserve/kernels/cuda/queue.py."""

    def __init__(
        self,
        set_context: int,
        copy: int,
        copy_batch: int,
        copy_2d: int,
        record: int,
        wait_event: int,
        launch: int,
        batch_reports_failed: bool,
        context: int,
    ) -> None: ...
    def copy_batch(
        self, to: npt.NDArray[np.int64], source: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], stream: int
    ) -> None: ...
    def record(self, event: int, stream: int) -> None: ...
    def hold_back(self, stream: int, event: int) -> None: ...
    def move(
        self,
        link: _PageLink,
        to_pool: bool,
        gpu_pages: Sequence[npt.NDArray[np.int32]],
        host_pages: Sequence[npt.NDArray[np.int32]],
        steps: list[int],
        stream: int,
        make_stream: int,
        kernel: _PageKernel | None,
    ) -> None: ...
    def submit(self) -> int: ...
    def over(self, ticket: int) -> bool: ...
    def wait(self, ticket: int) -> None: ...
    def take_failure(self, ticket: int) -> tuple[str, int] | None: ...

class HostMemory:
    """One mapping of host memory, all zero, that takes no memory before its pages are populated or written.

    A writable buffer of `bytes` bytes: the mapping lives as long as any array or tensor made of it.
    """

    def __init__(self, bytes: int) -> None:
        """`bytes` is rounded up to whole pages of the system; ResourceExhausted when the system will not map as many."""

    @property
    def address(self) -> int:
        """A multiple of 2 MiB."""

    @property
    def bytes(self) -> int: ...
    def prefer_node(self, node: int) -> bool:
        """Take memory of the NUMA node first from now on. False where the system forbids that."""

    def populate(self, offset: int, bytes: int, threads: int = 1) -> None:
        """Back the pages that [offset, offset + bytes) touches with memory, on 1..64 threads; contents stay.

        Raises ResourceExhausted naming host_cache when the system has no more; some pages may be backed by then.
        """

    def discard(self, offset: int, bytes: int) -> None:
        """Give the memory of whole pages back; on Linux they read as zero then."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
