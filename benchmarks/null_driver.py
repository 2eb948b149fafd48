"""The engine's own path on CUDA over a driver that does nothing, in a process of its own, on any machine.

Pages, histories and what a batch brings lie in plain memory; no kernel runs and no byte crosses a link. Copies are queued,
graphs launched and events waited for by the same calls as on a GPU, which are over at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mtserve.engine import core, served, setup
from mtserve.engine.forward import runners
from mtserve.engine.forward.gates import Gates, LayerWaits
from mtserve.engine.forward.graph_key import GraphKey
from mtserve.engine.forward.graphs import GraphRunner
from mtserve.engine.forward.metadata import Capacity, Metadata
from mtserve.kernels.cuda import driver
from mtserve.kernels.cuda.driver import Event, Function, current_context
from mtserve.kernels.cuda.graph import Graph
from mtserve.kernels.cuda.queue import PageKernel
from mtserve.kernels.host_copy.cuda import THREADS, HostCopy
from mtserve.kernels.unpack.cuda import MOST_PAGES, REBUILD_THREADS, TILE_COLUMNS, TILE_PAGES, Params
from mtserve.restore.gpus import gpu_figures
from mtserve.transfer.cuda_mover import CudaMover, layer_groups

SOURCE = Path(__file__).with_suffix(".c")
SMS = 132
TENSOR_MAP_BYTES = 128
KERNEL = ctypes.c_void_p(64)


class NullStream:
    """Stands in for a stream of torch."""

    made = 1 << 20

    def __init__(self, *_: Any, **__: Any) -> None:
        NullStream.made += 64
        self.cuda_stream = NullStream.made


class NullStack:
    """What a runner asks of its layers while it plans."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.work_options = {"heads": heads, "head_dim": head_dim, "sms": SMS, "deterministic": False}

    def max_splits(self, bucket: int) -> int:
        return bucket


class NullRunner(GraphRunner):
    """Every kind of batch has its graph already, an empty one."""

    def __init__(self, model: Any, config: Any) -> None:
        cpu, layers = torch.device("cpu"), model.config.layers
        width = -(-runners.max_prefix(model) // config.page_tokens)
        rows = runners.largest_batch(model, config)
        capacity = Capacity.of(model.schema, rows, config.max_batch_requests, width)
        tasks, self._groups = len(model.config.tasks), layer_groups(layers)
        groups = self._groups
        self._model, self._capture, self._layers = model, True, layers
        self._stack: Any = NullStack(model.config.heads, model.config.head_dim)
        self._metadata, self._early = Metadata(capacity, cpu), Metadata(capacity, cpu)
        self._logits = torch.zeros(capacity.rows, tasks)
        self._answers = [(torch.zeros(capacity.rows, tasks).numpy(), Event()) for _ in range(2)]
        self._waits = LayerWaits(groups)
        self._gates = [Gates(self._waits, groups) for _ in range(2)]
        self._copy, self._context = _null_copy(), current_context()
        self._graphs, self._runs = OrderedDict(), {}
        self._rows = self._padded_rows = self._captures = 0

    def _captured(self, key: GraphKey) -> Graph:
        self._captures += 1
        self._graphs[key] = Graph(KERNEL)
        return self._graphs[key]

    def prepare(self) -> None:
        pass

    def settle(self) -> None:
        pass


class NullUnpacker:
    """Makes nothing, by as many launches as the kernel that does."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states
        fields = [getattr(Params, name).offset for name in ("first", "last", "count", "pages")]
        columns = -(-2 * states.shape[-2] * states.shape[-1] // TILE_COLUMNS)
        self.kernel = PageKernel(
            KERNEL.value or 0, REBUILD_THREADS, 0, [bytes(TENSOR_MAP_BYTES), bytes(Params())], paged=1, fields=fields,
            most_pages=MOST_PAGES, tile_pages=TILE_PAGES, column_tiles=columns, most_blocks=SMS,
        )  # fmt: skip

    def unpack(self, *_: Any) -> None:
        raise AssertionError("a queue launches it")


def _null_copy() -> HostCopy:
    copy = HostCopy.__new__(HostCopy)  # whose kernel would be built
    copy._to, copy._source, copy._words = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    copy._launch = Function(KERNEL, 0).prepare(THREADS, copy._to, copy._source, copy._words)
    return copy


def _known_costs(
    runner: Any, planner: Any, builder: Any, mover: Any, model: Any, config: Any, *_: Any, **__: Any
) -> Any:
    return gpu_figures("h200").costs(model.config, packed=config.host_format != "kv")


def _build(folder: Path) -> Path:
    library = folder / "libcuda.so.1"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    return library


def install(folder: Path) -> None:
    """Have every engine of this process made for CUDA and given nothing of it; the driver is built in `folder`.

    There is no way back. Engines take `device="cpu"` and any dtype; what restoring costs is what it costs on an H200.
    """
    path, default = str(_build(folder)), NullStream()
    libraries = {False: ctypes.CDLL(path), True: ctypes.PyDLL(path)}
    patched: tuple[tuple[Any, str, Any], ...] = (
        (driver, "_library", lambda *, keeps_lock=False: libraries[keeps_lock]),
        (torch.cuda, "Stream", NullStream),
        (torch.cuda, "current_stream", lambda *_: default),
        (torch.cuda, "device", _null_device),
        (setup, "resolve_kernels", lambda *_: "cuda"),
        (setup, "_make_mover", _make_mover),
        (served, "make_runner", lambda model, config, *_: NullRunner(model, config)),
        (served, "make_unpacker", lambda kernels, packed, states, model: NullUnpacker(states)),
        (core, "known_costs", _known_costs),
    )
    for owner, name, value in patched:
        setattr(owner, name, value)


@contextlib.contextmanager
def _null_device(device: Any) -> Iterator[None]:
    yield


def _make_mover(pool: torch.Tensor, arena: Any, fault: Any) -> CudaMover:
    return CudaMover(pool, arena.tensor, fault, chunk_pages=arena.chunk_pages)
