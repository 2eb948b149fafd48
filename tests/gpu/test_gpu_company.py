"""Engines that are not alone: others queue work while they capture, another device is the current one."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from engine_world import Pending, World
from small_models import CAUSAL, small_model

from mtserve.engine.forward.graphs import RUNS_BEFORE_CAPTURE, GraphRunner
from mtserve.kernels.cuda.driver import OwnStream, current_context
from mtserve.kernels.cuda.graph import Graph, capture
from mtserve.kernels.cuda.queue import DriverQueue

pytestmark = pytest.mark.gpu
POOLED_STREAMS = 32  # that torch has of a device and hands out in turn
PIECES, PIECE_BYTES = 64, 4096
ERROR = 0.1  # relative L2, far above what bf16 makes and far below what a wrong page makes


def make_world(device: str, **config: object) -> World:
    sizes = {"layers": 4, "d": 96, "heads": 2, "head_dim": 64, "max_history": 600, "attention_length": 512}
    model = small_model(**{**sizes, "max_realtime": 600, **CAUSAL})
    return World(model, device=device, dtype="bfloat16", page_tokens=64, **config)


def check(pending: list[Pending]) -> None:
    for each in pending:
        got, expected = each.future.result(timeout=0).logits, each.expected()
        assert np.linalg.norm(got - expected) <= ERROR * np.linalg.norm(expected)


class Feeder:
    """Copies pieces on every stream that torch hands out, again and again, until it is stopped."""

    def __init__(self) -> None:
        self.streams = [torch.cuda.Stream() for _ in range(POOLED_STREAMS)]
        self.source = torch.randint(256, (PIECES * PIECE_BYTES,), dtype=torch.uint8).pin_memory()
        self.targets = torch.zeros(POOLED_STREAMS, PIECES * PIECE_BYTES, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self.errors: list[Exception] = []
        self.lists = 0
        self._queue = DriverQueue(current_context())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        offsets = np.arange(PIECES, dtype=np.int64) * PIECE_BYTES
        sizes = np.full(PIECES, PIECE_BYTES, dtype=np.int64)
        while not self._stop.is_set():
            for stream, target in zip(self.streams, self.targets, strict=True):
                places = offsets + target.data_ptr(), offsets + self.source.data_ptr()
                self._queue.copy_batch(*places, sizes, stream.cuda_stream)
            ticket = self._queue.submit()
            self._queue.wait(ticket)
            error = self._queue.take_error(ticket)
            if error is not None:
                self.errors.append(error)
            self.lists += 1

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_what_others_queue_meanwhile_becomes_no_part_of_a_graph() -> None:
    """By the thread of a queue, on streams of which any torch would capture on is one."""
    w = make_world("cuda", gpu_pages=60, host_pages=80)
    try:
        with Feeder() as feeder:
            w.put("a", 300)
            for candidates in range(40, 500, 64):  # each of another bucket of rows
                for _ in range(RUNS_BEFORE_CAPTURE + 2):
                    pending = [w.submit("a", candidates)]
                    w.run()
                    check(pending)
        assert w.engine.stats()["runner"]["captures"] > 6
        assert feeder.lists > 10
        assert feeder.errors == []
        torch.cuda.synchronize()
        assert (feeder.targets.cpu() == feeder.source).all()
        w.assert_idle()
    finally:
        w.engine.close()


class Cycle:
    """A graph that only the collector can free."""

    def __init__(self, graph: torch.cuda.CUDAGraph | Graph) -> None:
        self.graph, self.itself = graph, self


def make_graph(ours: bool) -> torch.cuda.CUDAGraph | Graph:
    values, own = torch.zeros(4, device="cuda"), OwnStream()
    if ours:
        with torch.cuda.stream(torch.cuda.ExternalStream(own.handle)):
            return capture(own.handle, values.zero_)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values.zero_()
    return graph


@pytest.mark.parametrize("ours", [True, False])
def test_graphs_may_be_freed_during_a_capture(ours: bool) -> None:
    """The collector runs whenever it likes."""
    garbage = [Cycle(make_graph(ours)) for _ in range(3)]
    values, own = torch.zeros(4, device="cuda"), OwnStream()

    def work() -> None:
        values.add_(1)
        garbage.clear()
        gc.collect()
        values.add_(1)

    with torch.cuda.stream(torch.cuda.ExternalStream(own.handle)):
        graph = capture(own.handle, work)
    torch.cuda.synchronize()
    assert values.tolist() == [0] * 4
    graph.launch(own.handle)
    torch.cuda.synchronize()
    assert values.tolist() == [2] * 4


def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    values, own = torch.zeros(4, device="cuda"), OwnStream()

    def work() -> None:
        values.add_(1)
        raise ZeroDivisionError

    with torch.cuda.stream(torch.cuda.ExternalStream(own.handle)):
        with pytest.raises(ZeroDivisionError):
            capture(own.handle, work)
        values.add_(2)
    torch.cuda.synchronize()
    assert values.tolist() == [2] * 4


def test_batches_that_cannot_be_captured_are_launched_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    w = make_world("cuda", gpu_pages=60, host_pages=80)
    run, failed = GraphRunner._run, []

    def fails(self: GraphRunner, key: object) -> None:
        if torch.cuda.is_current_stream_capturing():
            failed.append(key)
            raise RuntimeError("no")
        run(self, key)

    monkeypatch.setattr(GraphRunner, "_run", fails)
    try:
        w.put("a", 300)
        for _ in range(2 * RUNS_BEFORE_CAPTURE + 4):
            pending = [w.submit("a", 40)]
            w.run()
            check(pending)
        assert w.engine.stats()["runner"]["captures"] == 0
        assert len(failed) > 1  # tried again, but not with each batch
        w.assert_idle()
    finally:
        w.engine.close()


def test_a_forward_takes_no_memory_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph uses must be nobody else's later, and torch does not know that it was captured."""
    w = make_world("cuda", gpu_pages=60, host_pages=80)
    run, taken = GraphRunner._run, []

    def noted(self: GraphRunner, key: object) -> None:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        run(self, key)
        taken.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)

    monkeypatch.setattr(GraphRunner, "_run", noted)
    try:
        w.put("a", 300)
        for candidates in (40, 500, 40, 500, 40):
            pending = [w.submit("a", candidates)]
            w.run()
            check(pending)
        assert taken[2:] == [0] * (len(taken) - 2)  # the first of each kind may load modules
        assert len(taken) > 3
    finally:
        w.engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("host_format", ["kv", "x8"])
def test_engines_on_two_devices_take_turns_in_one_thread(host_format: str) -> None:
    torch.cuda.set_device(0)
    options = {"gpu_pages": 22, "host_pages": 80, "host_format": host_format}
    worlds = [make_world(f"cuda:{place}", **options) for place in (1, 0, 1)]
    try:
        for turn in range(3):
            for w in worlds:
                w.restore_at(turn)
            for user in ("a", "b", "c", "d"):  # more than a device holds: they come back from the host
                pending = []
                for w in worlds:
                    if turn == 0:
                        w.put(user, 380)
                    else:
                        w.append(user, 7)
                    pending.append(w.submit(user, 64))
                while not all(each.future.done() for each in pending) or any(w.engine._core.busy() for w in worlds):
                    for w in worlds:
                        w.step()
                check(pending)
        for w in worlds:
            assert w.value("loads_total") > 0
            w.assert_idle()
    finally:
        for w in worlds:
            w.engine.close()
