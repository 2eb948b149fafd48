"""Every refusal: its code, its message naming field and limit, and its trailing metadata."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from fake_engine import FakeEngine
from google.protobuf.message import Message

from mtserve import errors
from mtserve.metrics import CODES as COUNTED
from mtserve.proto.v1 import ranking_pb2 as pb
from mtserve.proto.v1.ranking_pb2_grpc import RankingStub
from mtserve.server import status, wire

Code = grpc.StatusCode


@pytest.fixture
def stub(engine: FakeEngine, serve: Callable[..., Any]) -> Iterator[RankingStub]:
    engine.put_user("ann", None, engine.schema.behaviours({"time_ms": [1, 2, 3]}))
    with grpc.insecure_channel(serve(engine, max_batch=2).target) as channel:
        yield RankingStub(channel)


def refused(method: Callable[..., Any], request: Message, **options: Any) -> tuple[Code, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        method(request, timeout=options.pop("timeout", 10), **options)
    error: Any = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata() or ())


def ids(*values: int) -> pb.Int64s:
    return pb.Int64s(values=values)


def column(name: str, *values: int) -> pb.Column:
    return pb.Column(name=name, ids=ids(*values))


def dense(name: str, *values: float) -> pb.Column:
    return pb.Column(name=name, floats=pb.Floats(values=values))


BAD_CANDIDATES = [
    (pb.Rows(count=101, columns=[column("item")]), "candidates.count", "101 is above the limit of 100"),
    (pb.Rows(count=4_000_000_000), "candidates.count", "4000000000 is above the limit of 100"),
    (pb.Rows(count=2, columns=[column("item", 1)]), "candidates.item", "has 1 values; expected 2 (count)"),
    (pb.Rows(count=1, columns=[column("item", 1, 2)]), "candidates.item", "has 2 values; expected 1 (count)"),
    (pb.Rows(count=1, time_ms=ids(1, 2)), "candidates.time_ms", "has 2 values; expected 1 (count)"),
    (pb.Rows(count=1, time_ms=ids(-2)), "candidates.time_ms", "must be -1 (now) or at least 0"),
    (pb.Rows(count=1, columns=[column("colour", 1)]), "candidates.colour", "unknown feature; known are item, aff"),
    (pb.Rows(count=1, columns=[column("time_ms", 1)]), "candidates.time_ms", "unknown feature"),
    (pb.Rows(count=1, columns=[column("item", 1)] * 2), "candidates.item", "is given twice"),
    (
        pb.Rows(count=1, columns=[dense("item", 1)]),
        "candidates.item",
        "expected ids (a categorical feature), got floats",
    ),
    (pb.Rows(count=1, columns=[pb.Column(name="item")]), "candidates.item", "got nothing"),
    (pb.Rows(count=1, columns=[column("affinity", 1, 2)]), "candidates.affinity", "expected floats (a dense feature)"),
    (pb.Rows(count=2, columns=[dense("affinity", 1, 2, 3)]), "candidates.affinity", "expected 4 (2 rows of width 2)"),
    (pb.Rows(count=1, columns=[dense("affinity", 1, np.nan)]), "candidates.affinity", "values must be finite"),
]


@pytest.mark.parametrize(("rows", "field", "message"), BAD_CANDIDATES)
def test_bad_candidates_name_the_column_and_the_limit(stub: Any, rows: Any, field: str, message: str) -> None:
    code, details, trailing = refused(stub.Score, pb.ScoreRequest(user_id="ann", candidates=rows))
    assert code is Code.INVALID_ARGUMENT
    assert details.startswith(f"{field}: ")
    assert message in details
    assert trailing["mtserve-field"] == field


ONE = pb.Rows(count=1, columns=[column("item", 1)])
TWO_LATE = pb.Rows(count=2, time_ms=ids(5, 4))
BAD_REQUESTS = [
    ("Score", pb.ScoreRequest(candidates=ONE), "user_id", "0 bytes is outside 1 to 256"),
    ("Score", pb.ScoreRequest(user_id="é" * 129, candidates=ONE), "user_id", "258 bytes is outside 1 to 256"),
    ("Score", pb.ScoreRequest(user_id="ann", deadline_ms=3_600_001), "deadline_ms", "above the limit of 3600000"),
    ("Score", pb.ScoreRequest(user_id="ann", context=[column("item", 1)]), "context.item", "not a context feature"),
    ("Score", pb.ScoreRequest(user_id="ann", context=[column("hour", 1, 2)]), "context.hour", "expected 1 (count)"),
    ("Score", pb.ScoreRequest(user_id="ann", append={}, history={}), "append", "cannot go with history"),
    ("Score", pb.ScoreRequest(user_id="ann", append={"position": -1}), "position", "-1 is below 0"),
    (
        "Score",
        pb.ScoreRequest(user_id="ann", append={"behaviours": TWO_LATE}),
        "behaviours[1].time_ms",
        "4 is before the previous behaviour's 5",
    ),
    ("Append", pb.AppendRequest(user_id="ann", behaviours=pb.Rows(count=1)), "behaviours.time_ms", "is required"),
    ("Append", pb.AppendRequest(user_id="ann", behaviours=pb.Rows(count=51)), "behaviours.count", "limit of 50"),
    ("Append", pb.AppendRequest(user_id="ann", position=-1), "position", "-1 is below 0"),
    ("Truncate", pb.TruncateRequest(user_id="ann", position=-7), "position", "-7 is below 0"),
    ("PutUser", pb.PutUserRequest(user_id="ann", features=[dense("segment", 1)]), "features.segment", "expected ids"),
    ("PutUser", pb.PutUserRequest(user_id="ann", history=pb.Rows(count=51)), "history.count", "limit of 50"),
    ("DeleteUser", pb.DeleteUserRequest(), "user_id", "0 bytes"),
    ("Prefetch", pb.PrefetchRequest(), "user_id", "0 bytes"),
    ("Invalidate", pb.InvalidateRequest(), "target", "name a user_id, or say all"),
    ("Invalidate", pb.InvalidateRequest(all=False), "target", "name a user_id, or say all"),
    ("Pin", pb.PinRequest(user_ids=["ann", ""]), "user_id", "0 bytes"),
    ("Pin", pb.PinRequest(user_ids=["x"] * 65537), "user_ids", "65537 users are above the limit of 65536"),
    ("Unpin", pb.UnpinRequest(user_ids=["x" * 257]), "user_id", "257 bytes"),
    ("Unpin", pb.UnpinRequest(user_ids=["x"] * 65537), "user_ids", "limit of 65536"),
    ("ScoreBatch", pb.ScoreBatchRequest(requests=[{}] * 3), "requests", "3 is above the limit of 2"),
]


@pytest.mark.parametrize(("method", "request_", "field", "message"), BAD_REQUESTS)
def test_bad_requests_name_the_field_and_the_limit(
    stub: Any, engine: FakeEngine, method: str, request_: Any, field: str, message: str
) -> None:
    code, details, trailing = refused(getattr(stub, method), request_)
    assert code is Code.INVALID_ARGUMENT
    assert field in trailing["mtserve-field"]
    assert message in details
    assert len(engine.histories["ann"]) == 3
    assert engine.metrics.value("answers_total", "INVALID_ARGUMENT") == 1


def test_nothing_is_appended_when_the_candidates_are_bad(stub: Any, engine: FakeEngine) -> None:
    append = pb.AppendFirst(behaviours=pb.Rows(count=1, time_ms=ids(9)))
    bad = pb.Rows(count=1, columns=[column("colour", 1)])
    assert (
        refused(stub.Score, pb.ScoreRequest(user_id="ann", candidates=bad, append=append))[0] is Code.INVALID_ARGUMENT
    )
    assert len(engine.histories["ann"]) == 3


def test_rows_that_would_decode_to_too_many_bytes_are_refused(engine: FakeEngine) -> None:
    from mtserve.server.convert import Converter, Limits

    converter = Converter(engine.schema, Limits(candidates=100, behaviours=10**9, decoded_bytes=1000))
    with pytest.raises(errors.InvalidArgument, match=r"behaviours.count: 51 rows take 1020 bytes; the limit is 1000"):
        converter.behaviours(pb.Rows(count=51))


@pytest.mark.parametrize(
    ("request_", "position"),
    [(pb.AppendRequest(user_id="ann", position=2), "3"), (pb.AppendRequest(user_id="new", position=4), "0")],
)
def test_a_gap_or_overlap_carries_the_servers_position(stub: Any, request_: Any, position: str) -> None:
    code, details, trailing = refused(stub.Append, request_)
    assert code is Code.FAILED_PRECONDITION
    assert f"server is at {position}" in details
    assert (trailing["mtserve-position"], trailing["mtserve-field"]) == (position, "position")


def test_an_unknown_user_is_not_found(stub: Any) -> None:
    code, details, trailing = refused(stub.Score, pb.ScoreRequest(user_id="zoë", candidates=ONE))
    assert (code, details) == (Code.NOT_FOUND, "user_id: 'zoë' has no history here")
    assert trailing["mtserve-field"] == "user_id"
    assert "mtserve-position" not in trailing


def test_a_full_queue_is_resource_exhausted(engine: FakeEngine, serve: Callable[..., Any], eventually: Any) -> None:
    engine = FakeEngine(max_queue=1)
    engine.put_user("ann")
    engine.held.set()
    with grpc.insecure_channel(serve(engine).target) as channel:
        stub = RankingStub(channel)
        first = stub.Score.future(pb.ScoreRequest(user_id="ann", candidates=ONE))
        eventually(lambda: len(engine.waiting) == 1)
        code, details, _ = refused(stub.Score, pb.ScoreRequest(user_id="ann", candidates=ONE))
        assert (code, details) == (Code.RESOURCE_EXHAUSTED, "queue: holds 1 requests already")
        engine.release()
        assert len(first.result(10).scores) == 3


CASES = [
    (errors.DeadlineExceeded("passed"), Code.DEADLINE_EXCEEDED, "passed"),
    (errors.Cancelled("by engine"), Code.CANCELLED, "by engine"),
    (errors.Unavailable("engine closed"), Code.UNAVAILABLE, "engine closed"),
    (errors.TransferFailed("copy 7", field="load"), Code.INTERNAL, "load: copy 7"),
    (errors.CorruptState("index"), Code.DATA_LOSS, "index"),
    (errors.MtserveError("other"), Code.INTERNAL, "other"),
]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("error", "expected", "message"), CASES)
def test_engine_errors_keep_their_code(
    stub: Any, engine: FakeEngine, later: bool, error: Exception, expected: Code, message: str
) -> None:
    setattr(engine, "fail_later" if later else "fail", error)
    code, details, _ = refused(stub.Score, pb.ScoreRequest(user_id="ann", candidates=ONE))
    assert (code, details) == (expected, message)
    assert engine.metrics.value("answers_total", expected.name) == 1


def test_an_unexpected_error_is_logged_and_hidden(
    stub: Any, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_later = ZeroDivisionError("a secret")
    with caplog.at_level(logging.ERROR, "mtserve.server"):
        code, details, trailing = refused(stub.Score, pb.ScoreRequest(user_id="ann", candidates=ONE))
    assert code is Code.INTERNAL
    assert "secret" not in details
    assert "mtserve-field" not in trailing
    assert "ZeroDivisionError: a secret" in caplog.text


def test_hostile_names_fit_into_metadata(stub: Any) -> None:
    name = "ü\n" * 40_000
    code, details, trailing = refused(
        stub.Score, pb.ScoreRequest(user_id="ann", candidates=pb.Rows(count=1, columns=[column(name, 1)]))
    )
    assert code is Code.INVALID_ARGUMENT
    assert len(details) <= status.MAX_MESSAGE
    assert trailing["mtserve-field"].startswith("candidates.\\xfc\\n")
    assert len(trailing["mtserve-field"]) == status.MAX_FIELD


def test_every_error_class_has_a_code_that_is_counted() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.MtserveError)]
    assert set(status.CODES) == set(classes)
    assert {code.name for code in status.CODES.values()} <= set(COUNTED)


@pytest.mark.parametrize("kind", [kind for kind in status.CODES if kind is not errors.TransferFailed])
def test_the_client_raises_what_the_server_raised(kind: type[errors.MtserveError]) -> None:
    options = {"position": 7} if kind is errors.FailedPrecondition else {}
    raised = kind("the limit is 5", field="queue", **options)
    again = status.to_error(status.of(raised))
    assert type(again) is kind
    assert (str(again), again.field) == ("queue: the limit is 5", "queue")
    assert getattr(again, "position", -1) == getattr(raised, "position", -1)


def test_unowned_codes_become_the_base_error() -> None:
    assert type(status.to_error(status.Status(Code.UNIMPLEMENTED, "no"))) is errors.MtserveError
    assert status.code_of(99) is Code.UNKNOWN


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 2047, 2048, 5000])
def test_packing_equals_protobufs_own(count: int) -> None:
    values = np.random.default_rng(count).integers(-(2**63), 2**63 - 1, count)
    assert wire.pack_int64s("x", values) == ids(*values.tolist())
    np.testing.assert_array_equal(wire.ids(ids(*values.tolist())), values)
    parts = values.astype(np.float32)
    np.testing.assert_array_equal(wire.floats(pb.Floats(values=parts.tolist())), parts)


def test_unknown_fields_behind_the_values_are_left_out() -> None:
    later = ids(5, 6).SerializeToString() + b"\x10\x07"  # field 2, varint 7
    assert wire.ids(pb.Int64s.FromString(later)).tolist() == [5, 6]
