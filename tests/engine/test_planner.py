"""The batch layout, token by token: derived here once more from the definitions, slowly."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from small_models import (
    BARE_SCHEMA,
    CAUSAL,
    ITEM,
    SCHEMA,
    START_MS,
    make_behaviours,
    make_candidates,
    make_features,
    small_model,
)

from mtserve import _core
from mtserve.engine.forward.batch import BatchArrays, BatchPlan, BatchSize
from mtserve.engine.forward.planner import ROWS_OF_PART, Planner
from mtserve.engine.queue.filling import Slot
from mtserve.engine.request.job import Job, make_job
from mtserve.engine.request.sequence import SequenceBuilder
from mtserve.engine.tiers.tiers import Reservation
from mtserve.errors import InvalidArgument
from mtserve.kernels.token_embedding.batch import TILE_TOKENS
from mtserve.model.mask import visible
from mtserve.model.ranking import RankingModel
from mtserve.model.schema import Feature, FeatureSchema
from mtserve.model.tokeniser import GAP_THRESHOLDS_MS, gap_buckets
from mtserve.types import History

PAGE_TOKENS = 4
UNTOUCHED = 77
# Rows of 4, 12 and 28 bytes: neighbours in `raw` are aligned to nothing more.
ODD_SCHEMA = FeatureSchema(
    user=(Feature("age", kind="dense", width=1),),
    behaviour=(Feature("dwell", kind="dense", width=1),),
    candidate=(ITEM, Feature("affinity", kind="dense", width=3, role="cross")),
)
SCHEMAS = [SCHEMA, BARE_SCHEMA, ODD_SCHEMA]
MODELS: list[dict[str, Any]] = [{}, CAUSAL, {"norm": "plain"}, {"static_attention": "causal", "norm": "plain"}]


@dataclass
class Case:
    """Random slots of one model, and pages for them (None: cache off)."""

    model: RankingModel
    slots: list[Slot]
    reservation: Reservation | None

    def plan(self, room: Any = BatchArrays.empty, rows_of_part: int = ROWS_OF_PART) -> BatchPlan:
        planner = Planner(self.model, PAGE_TOKENS, rows_of_part=rows_of_part)
        return planner.plan(self.slots, self.reservation, room)


@dataclass
class Token:
    """What the arrays should say of one token; `row` is its row."""

    kind: int
    row: int
    feature_row: bytes
    limit: int
    group: int
    target: int = -1
    position: int = 0
    bucket: int = 0
    job: Job | None = field(default=None, compare=False)


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    model = small_model(schema=SCHEMAS[seed % 3], **MODELS[seed // 3 % 4])
    builder = SequenceBuilder(model.config, model.schema, "model")
    cache = seed % 7 != 0
    slots = [_random_slot(rng, builder, f"user-{index}", cache) for index in range(int(rng.integers(1, 7)))]
    return Case(model, slots, _random_pages(rng, slots) if cache else None)


def _random_slot(rng: np.random.Generator, builder: SequenceBuilder, user: str, cache: bool) -> Slot:
    rows = make_behaviours(rng, int(rng.integers(0, 60)), schema=builder.schema)
    features = make_features(rng, builder.schema) if rng.random() < 0.7 else None
    sequence = builder.build(user, History(features, 0, rows))
    prefix = sequence.groups.prefix
    cached = int(rng.integers(0, prefix + 1)) if cache else 0
    encode_to = prefix
    if cache and rng.random() < 0.3:
        encode_to = int(rng.integers(cached, prefix + 1))
    jobs = []
    for _ in range(int(rng.integers(0, 4))):
        earlier = builder.build(user, History(features, 0, rows[: len(rows) - int(rng.integers(0, 3))]))
        candidates = make_candidates(rng, int(rng.choice([0, 1, 5, 140])), schema=builder.schema)
        if len(rows):
            candidates["time_ms"] = rng.choice([-1, 0, *(rows["time_ms"] + 1), START_MS * 2], len(candidates))
        own = earlier if sequence.extends(earlier) else sequence
        jobs.append(make_job(own, candidates, Future(), START_MS / 1000, None))
    return Slot(sequence, cached, encode_to, jobs)


def _random_pages(rng: np.random.Generator, slots: list[Slot]) -> Reservation:
    cached = np.array([slot.cached for slot in slots], dtype=np.int32)
    ends = np.array([slot.encode_to for slot in slots], dtype=np.int32)
    stored = np.where(rng.random(len(slots)) < 0.6, ends, rng.integers(cached, ends + 1)).astype(np.int32)
    table = np.full((len(slots), 17), -1, dtype=np.int32)
    ids = rng.permutation(table.size).astype(np.int32)
    for row, tokens in enumerate(stored.tolist()):
        pages = -(-tokens // PAGE_TOKENS)
        table[row, :pages] = ids[17 * row : 17 * row + pages]
    return Reservation(1, cached, stored, table, int((table >= 0).sum()))


# The definitions


def expected_slots(case: Case) -> list[list[Token]]:
    """The tokens of each slot in the order of their rows."""
    slots, row = [], 0
    for index, slot in enumerate(case.slots):
        end, jobs = slot.encode_to, slot.jobs
        prefix = slot.sequence.groups.prefix
        if end < prefix and case.reservation is not None:
            if case.reservation.stored[index] < end:
                end = prefix
            else:
                jobs = []
        tokens = [_prefix_token(case, index, token, row + token - slot.cached) for token in range(slot.cached, end)]
        for job in jobs:
            tokens += [_candidate(case, job, i, row + len(tokens) + i) for i in range(len(job.candidates))]
        slots.append(tokens)
        row += len(tokens)
    return slots


def _prefix_token(case: Case, index: int, token: int, row: int) -> Token:
    sequence, config = case.slots[index].sequence, case.model.config
    users, groups = len(case.model.schema.user), sequence.groups
    sees = sum(visible(groups, config.static_attention, token, other) for other in range(groups.prefix))
    group = 0 if token < groups.user else 1 if token < groups.frozen else 2
    target = -1
    if case.reservation is not None and token < case.reservation.stored[index]:
        page = int(case.reservation.page_table[index, token // PAGE_TOKENS])
        target = page * PAGE_TOKENS + token % PAGE_TOKENS
    group = 0 if config.norm == "plain" else group
    if token < users:
        return Token(token, row, sequence.features.tobytes(), sees, group, target)
    place = token - users
    gap = int(sequence.kept["time_ms"][place]) - int(sequence.kept["time_ms"][place - 1]) if place else 0
    return Token(users, row, sequence.kept[place].tobytes(), sees, group, target, place, _bucket(gap))


def _candidate(case: Case, job: Job, i: int, row: int) -> Token:
    groups, times = job.sequence.groups, job.sequence.kept["time_ms"].tolist()
    exposure = int(job.candidates["time_ms"][i])
    seen = sum(time < exposure for time in times[groups.static :])
    sees = sum(visible(groups, "full", groups.prefix, other, seen) for other in range(groups.prefix))
    last = groups.static + seen
    bucket = _bucket(exposure - times[last - 1]) if last else 0
    group = 0 if case.model.config.norm == "plain" else 3
    kind = len(case.model.schema.user) + 1
    return Token(kind, row, job.candidates[i].tobytes(), sees, group, bucket=bucket, job=job)


def _bucket(gap_ms: int) -> int:
    return min(63, int(2 * math.log2(1 + max(gap_ms, 0) / 1000)))


# Against them


def check_plan(case: Case, plan: BatchPlan, slots: list[list[Token]]) -> None:
    rows = [token for tokens in slots for token in tokens]
    arrays, layout = plan.arrays, plan.layout
    assert plan.rows == plan.tokens == layout.rows == len(rows)
    assert [token.limit for token in rows] == layout.limit.tolist()
    assert [token.group for token in rows] == layout.group.tolist()
    assert [token.target for token in rows] == layout.target.tolist()
    first = 0
    for index, (slot, tokens) in enumerate(zip(case.slots, slots, strict=True)):
        delta = sum(token.job is None for token in tokens)
        assert layout.slots[index].tolist() == [slot.cached, delta, first, len(tokens)]
        first += len(tokens)
    ordered = sorted(rows, key=lambda token: token.kind)  # stable: in the order of rows inside a kind
    for i, token in enumerate(ordered):
        source = int(arrays.source[i])
        assert source % 4 == 0
        assert arrays.raw[source : source + len(token.feature_row)].tobytes() == token.feature_row
    assert [token.row for token in ordered] == arrays.row[: len(rows)].tolist()
    assert [token.position for token in ordered] == arrays.position[: len(rows)].tolist()
    assert [token.bucket for token in ordered] == arrays.bucket[: len(rows)].tolist()
    check_kinds(case, plan, ordered)
    candidates = [token for token in ordered if token.job is not None]
    assert plan.candidates == len(candidates)
    assert layout.candidate_rows.tolist() == [token.row for token in candidates]
    assert [job for job, begin, end in plan.scored for _ in range(begin, end)] == [token.job for token in candidates]


def check_kinds(case: Case, plan: BatchPlan, ordered: list[Token]) -> None:
    """Where each kind begins, its tiles, its feature rows."""
    kinds = len(case.model.schema.user) + 2
    inputs = plan.inputs(case.model.schema)
    assert len(plan.first_token) == kinds + 1
    assert (inputs.rows, len(inputs.kinds)) == (plan.rows, kinds)
    tiles = [tuple(tile) for tile in plan.arrays.tiles[: plan.tiles].tolist()]
    for kind in range(kinds):
        tokens = [token for token in ordered if token.kind == kind]
        first = plan.first_token[kind]
        assert plan.first_token[kind + 1] - first == len(tokens)
        assert ordered[first : first + len(tokens)] == tokens
        cuts = range(0, len(tokens), TILE_TOKENS)
        mine = [(kind, first + cut, min(TILE_TOKENS, len(tokens) - cut), 0) for cut in cuts]
        assert mine == [tile for tile in tiles if tile[0] == kind]
        assert inputs.kinds[kind].features.tobytes() == b"".join(token.feature_row for token in tokens)
        assert inputs.kinds[kind].destinations.tolist() == [token.row for token in tokens]
        if tokens and kind >= kinds - 2:
            assert plan.arrays.source[first] % 16 == 0
    assert tiles == sorted(tiles)
    assert all(tile == [-1, 0, 0, 0] for tile in plan.arrays.tiles[plan.tiles :].tolist())


def roomy(size: BatchSize) -> BatchArrays:
    """More room than is needed, all of it marked."""
    larger = BatchSize(size.rows + 5, size.slots + 2, size.width + 3, size.raw_bytes + 7, size.tiles + 4)
    arrays = BatchArrays.empty(larger)
    for array in arrays:
        array.fill(UNTOUCHED)
    return arrays


@pytest.mark.parametrize("seed", range(84))
def test_every_token_is_where_its_definition_says(seed: int) -> None:
    case = random_case(seed)
    expected = expected_slots(case)
    check_plan(case, case.plan(), expected)
    check_plan(case, case.plan(rows_of_part=1 + seed % 9), expected)  # by several threads


@pytest.mark.parametrize("seed", range(84, 96))
def test_room_beyond_the_batch_says_nothing_here(seed: int) -> None:
    case = random_case(seed)
    expected = expected_slots(case)
    plan = case.plan(roomy)
    check_plan(case, plan, expected)
    arrays, size = plan.arrays, plan.size
    for array, nothing in ((arrays.limit, 0), (arrays.group, 0), (arrays.target, -1)):
        assert array[size.rows :].tolist() == [nothing] * 5
    assert set(arrays.tiles[plan.tiles :, 0].tolist()) == {-1}
    tails = (arrays.row, arrays.source, arrays.position, arrays.bucket)
    for array in (*(each[size.rows :] for each in tails), arrays.raw[size.raw_bytes :], arrays.slots[size.slots :],
                  arrays.page_table[:, size.width :], arrays.page_table[size.slots :]):  # fmt: skip
        assert (array == UNTOUCHED).all()
    table = case.reservation.page_table[:, : size.width] if case.reservation is not None else np.empty((size.slots, 0))
    assert np.array_equal(plan.layout.page_table, table)


def test_random_cases_cover_what_they_are_for() -> None:
    """Parts kept and widened, no new behaviours, no candidates, several jobs, new U tokens of some slots only."""
    seen = set()
    for seed in range(84):
        case = random_case(seed)
        tokens = [token for each in expected_slots(case) for token in each]
        for index, slot in enumerate(case.slots):
            if slot.partial and case.reservation is not None:
                seen.add("widened" if case.reservation.stored[index] < slot.encode_to else "part")
            seen.add("nothing new" if slot.cached == slot.encode_to else "new")
            seen.add("no job" if not slot.jobs else "several jobs" if len(slot.jobs) > 1 else "one job")
            seen |= {"prefetch" for job in slot.jobs if not len(job.candidates)}
        seen.add("cache off" if case.reservation is None else "cache on")
        some = [slot.cached == 0 for slot in case.slots]
        if case.model.schema.user and any(some) and not all(some):
            seen.add("some U")
        if not any(token.job for token in tokens):
            seen.add("no candidates")
    assert seen >= {"widened", "part", "nothing new", "no job", "several jobs", "prefetch", "cache off", "some U"}
    assert "no candidates" in seen


def test_gaps_at_the_edges_of_buckets_agree_with_the_model() -> None:
    model = small_model(schema=BARE_SCHEMA, max_history=400, max_realtime=400, **CAUSAL)
    gaps = (GAP_THRESHOLDS_MS[:, None] + [0, -1, 1]).ravel()[:150]
    rows = np.zeros(len(gaps), BARE_SCHEMA.behaviour_dtype)
    rows["time_ms"] = START_MS + np.cumsum(gaps)
    sequence = SequenceBuilder(model.config, BARE_SCHEMA, "model").build("u", History(None, 0, rows))
    plan = Planner(model, PAGE_TOKENS).plan([Slot(sequence, 0, len(rows), [])], None, BatchArrays.empty)
    assert plan.arrays.bucket.tolist() == [0, *gap_buckets(gaps[1:]).tolist()]


@pytest.mark.parametrize("seed", range(3))
def test_buckets_found_in_cpp_are_those_of_the_model(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = (GAP_THRESHOLDS_MS[:, None] + [-1, 0, 1]).ravel()
    extremes = np.array([-(2**63), -1, 0, 1, 2**62, 2**63 - 1])
    gaps = np.concatenate([edges, extremes, np.exp2(rng.uniform(0, 63, 5000)).astype(np.int64)])
    found = np.full(len(gaps), -1, dtype=np.int32)
    _core._GapBuckets(GAP_THRESHOLDS_MS).find(gaps, found)
    assert np.array_equal(found, gap_buckets(gaps))


@pytest.mark.parametrize("thresholds", [[0], [-5, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 5, 5, 5, 2**53 - 1]])
def test_buckets_are_found_however_close_their_thresholds_lie(thresholds: list[int]) -> None:
    gaps = np.concatenate([np.arange(-2, 40), 2**53 + np.arange(-2, 3)])
    found = np.full(len(gaps), -1, dtype=np.int32)
    _core._GapBuckets(np.array(thresholds)).find(gaps, found)
    assert np.array_equal(found, np.searchsorted(thresholds[1:], gaps, side="right"))


@pytest.mark.parametrize(
    ("gaps", "out", "field"),
    [
        (np.zeros(3, np.int32), np.zeros(3, np.int32), "gaps"),
        (np.zeros((3, 1), np.int64), np.zeros(3, np.int32), "gaps"),
        (np.zeros(3, np.int64), np.zeros(2, np.int32), "out"),
        (np.zeros(3, np.int64), np.zeros(3, np.int64), "out"),
    ],
)
def test_gaps_of_another_shape_or_type_are_refused(gaps: Any, out: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _core._GapBuckets(GAP_THRESHOLDS_MS).find(gaps, out)
    assert caught.value.field == field


def test_a_part_without_room_is_encoded_whole() -> None:
    model = small_model(**CAUSAL)
    rng = np.random.default_rng(0)
    sequence = SequenceBuilder(model.config, SCHEMA, "model").build("u", History(None, 0, make_behaviours(rng, 20)))
    job = make_job(sequence, make_candidates(rng, 3), Future(), 0.0, None)
    table = np.array([[5, 2]], dtype=np.int32)
    for stored, planned in ((8, 8), (7, 22)):
        slot = Slot(sequence, 0, 8, [job])
        pages = Reservation(1, np.zeros(1, np.int32), np.array([stored], np.int32), table, 2)
        plan = Planner(model, PAGE_TOKENS).plan([slot], pages, BatchArrays.empty)
        assert slot.encode_to == planned
        assert [scored[0] for scored in plan.scored] == ([] if slot.partial else [job])
        assert plan.layout.target[:8].tolist() == [20, 21, 22, 23, 8, 9, 10, 11 if stored == 8 else -1]


def test_nothing_to_do_is_an_empty_plan() -> None:
    model = small_model(schema=BARE_SCHEMA)
    sequence = SequenceBuilder(model.config, BARE_SCHEMA, "model").build("u", History(None, 0, make_empty()))
    plan = Planner(model, PAGE_TOKENS).plan([Slot(sequence, 0, 0, [])], None, BatchArrays.empty)
    assert (plan.tokens, plan.tiles, plan.candidates, plan.raw_bytes, plan.scored) == (0, 0, 0, 0, ())
    assert plan.layout.slots.tolist() == [[0, 0, 0, 0]]


def make_empty() -> Any:
    return np.empty(0, BARE_SCHEMA.behaviour_dtype)


# Arguments of the core that no planner would pass

INT32 = np.dtype(np.int32)


def core_arguments() -> dict[str, Any]:
    """Two slots of ODD_SCHEMA, each with a U feature, 4 behaviours (one new in the second) and 2 candidates."""
    candidates = [np.zeros(2, ODD_SCHEMA.candidate_dtype) for _ in range(2)]
    arrays = roomy(BatchSize(rows=10, slots=2, width=2, raw_bytes=16 + 5 * 12 + 4 + 4 * 28, tiles=4))
    return {
        "spans": [0, 5, 1, 5, 1, 4, 5, 1, 5, 1],
        "features": [np.zeros(1, ODD_SCHEMA.user_dtype)] * 2,
        "kept": [np.zeros(4, ODD_SCHEMA.behaviour_dtype)] * 2,
        "candidates": candidates,
        "limits": [np.full(2, 5, INT32)] * 2,
        "recency": [np.zeros(2, INT32)] * 2,
        "page_table": np.array([[3, 4], [1, 0]], INT32),
        "out": arrays,
    }


def core_layout(**changes: Any) -> Any:
    shape = {"users": 1, "user_bytes": 4, "behaviour_bytes": 12, "candidate_bytes": 28, "page_tokens": 4}
    flags = {"tile_tokens": TILE_TOKENS, "rows_of_part": 3, "full_attention": True, "plain_norm": False}
    return _core._BatchLayout(**{**shape, **flags, "gap_thresholds": GAP_THRESHOLDS_MS, **changes})


def _spans(index: int, value: Any) -> dict[str, Any]:
    spans: list[Any] = list(core_arguments()["spans"])
    spans[index] = value
    return {"spans": spans}


def _frozen(array: Any) -> Any:
    array.flags.writeable = False
    return array


BAD = {
    "cached below 0": ("spans", _spans(0, -1)),
    "cached behind the end": ("spans", _spans(5, 6)),
    "encode_to too far": ("kept", _spans(1, 6)),
    "encode_to beyond the limit": ("spans", _spans(1, 2**25)),
    "frozen within U": ("spans", _spans(2, 0)),
    "stored behind the end": ("spans", _spans(3, 6)),
    "stored below 0": ("spans", _spans(3, -1)),
    "jobs below 0": ("spans", _spans(4, -1)),
    "a job too many": ("candidates", _spans(4, 2)),
    "a span that is no integer": ("spans", _spans(0, 0.5)),
    "a span beyond 32 bits": ("spans", _spans(0, 2**31)),
    "half a span": ("spans", {"spans": [0, 5, 1, 5, 1, 4]}),
    "spans of nothing": ("spans", {"spans": 5}),
    "no features": ("features", {"features": []}),
    "two feature rows": ("features", {"features": [np.zeros(2, ODD_SCHEMA.user_dtype)] * 2}),
    "features of another schema": ("features", {"features": [np.zeros(1, SCHEMA.user_dtype)] * 2}),
    "behaviours of one slot": ("kept", {"kept": [np.zeros(4, ODD_SCHEMA.behaviour_dtype)]}),
    "behaviours of another schema": ("kept", {"kept": [np.zeros(4, SCHEMA.behaviour_dtype)] * 2}),
    "behaviours with gaps": ("kept", {"kept": [np.zeros(8, ODD_SCHEMA.behaviour_dtype)[::2]] * 2}),
    "candidates of another schema": ("candidates", {"candidates": [np.zeros(2, SCHEMA.candidate_dtype)] * 2}),
    "limits of one job": ("limits", {"limits": [np.zeros(2, INT32)]}),
    "limits of one candidate": ("limits", {"limits": [np.zeros(1, INT32)] * 2}),
    "limits of 64 bits": ("limits", {"limits": [np.zeros(2, np.int64)] * 2}),
    "recency of one job": ("recency", {"recency": [np.zeros(2, INT32)]}),
    "recency of one candidate": ("recency", {"recency": [np.zeros(1, INT32)] * 2}),
    "recency of floats": ("recency", {"recency": [np.zeros(2, np.float32)] * 2}),
    "no pages": ("page_table", {"page_table": None}),
    "too few pages": ("page_table", {"page_table": np.zeros((2, 1), INT32)}),
    "pages of one slot": ("page_table", {"page_table": np.zeros((1, 2), INT32)}),
    "no such page": ("page_table", {"page_table": np.array([[3, 4], [1, -1]], INT32)}),
    "a page beyond 32 bits of tokens": ("page_table", {"page_table": np.array([[3, 2**29], [1, 0]], INT32)}),
    "pages of 64 bits": ("page_table", {"page_table": np.zeros((2, 2), np.int64)}),
    "an array less": ("out", {"out": core_arguments()["out"][:10]}),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(what: str) -> None:
    name, change = BAD[what]
    arguments = core_arguments()
    with pytest.raises(InvalidArgument) as error:
        core_layout().plan(**{**arguments, **change})
    assert error.value.field.split("[")[0] == name
    assert all((array == UNTOUCHED).all() for array in arguments["out"])


def tight() -> BatchArrays:
    """Exactly the room that `core_arguments` need."""
    arrays = BatchArrays.empty(BatchSize(rows=10, slots=2, width=2, raw_bytes=192, tiles=3))
    for array in arrays:
        array.fill(UNTOUCHED)
    return arrays


def test_exact_room_is_enough() -> None:
    assert core_layout().plan(**{**core_arguments(), "out": tight()}) == (3, (0, 1, 6, 10))


SHORT = [(name, getattr(tight(), name)[:-1]) for name in BatchArrays._fields]
SPARSE = [(name, getattr(roomy(BatchSize(20, 4, 4, 400, 8)), name)[::2]) for name in BatchArrays._fields]
LOCKED = [(name, _frozen(getattr(tight(), name))) for name in BatchArrays._fields]
WIDE = [(name, getattr(tight(), name).astype(np.int64)) for name in BatchArrays._fields if name != "raw"]
NARROW = [(name, getattr(tight(), name)[:, :-1].copy()) for name in ("slots", "page_table", "tiles")]


@pytest.mark.parametrize(("name", "array"), [*SHORT, *SPARSE, *LOCKED, *WIDE, *NARROW])
def test_unfit_room_is_named_and_nothing_is_written(name: str, array: Any) -> None:
    out = tight()._replace(**{name: array})
    with pytest.raises(InvalidArgument) as error:
        core_layout().plan(**{**core_arguments(), "out": out})
    assert error.value.field == name
    assert all((each == UNTOUCHED).all() for each in out)


@pytest.mark.parametrize(
    ("field", "value"),
    [("users", -1), ("user_bytes", 0), ("behaviour_bytes", 7), ("candidate_bytes", 2**31), ("page_tokens", 0),
     ("tile_tokens", 0), ("rows_of_part", 0), ("gap_thresholds", np.empty(0, np.int64)), ("gap_thresholds", np.array([1, 0])),
     ("gap_thresholds", np.array([-2, 0, 5])), ("gap_thresholds", np.array([0, 2**53])),
     ("gap_thresholds", np.zeros(64, INT32))],
)  # fmt: skip
def test_a_bad_shape_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as error:
        core_layout(**{field: value})
    assert error.value.field == field
