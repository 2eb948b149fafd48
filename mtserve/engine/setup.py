"""Turning a configuration into devices, sizes and memory."""

from __future__ import annotations

import os

import torch

from mtserve.config import EngineConfig, ModelConfig
from mtserve.errors import InvalidArgument, ResourceExhausted
from mtserve.kernels.page_write.rounding import FP8
from mtserve.transfer.arena import HostArena
from mtserve.transfer.chaos import Chaos
from mtserve.transfer.mover import Fault, Mover, SyncMover
from mtserve.transfer.pool import PageShape
from mtserve.transfer.slow_mover import SlowMover
from mtserve.types import Clock
from mtserve.units import format_bytes, parse_capacity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_CACHE = {"cuda": "60%", "cpu": "1GiB"}


def resolve_device(name: str) -> torch.device:
    """The torch device meant by `name`. Raises InvalidArgument for one that is not here."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidArgument(f"{name!r} is not auto, cpu, cuda or cuda:N", field="device") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"{name!r} is not auto, cpu, cuda or cuda:N", field="device")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InvalidArgument(f"{name!r} is not here; CUDA devices found: {count}", field="device")
        return torch.device("cuda", device.index or 0)
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and states."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def resolve_kernels(config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The kernels meant by `kernels`. "auto" is "cuda" exactly where those can run, else "eager".

    Raises InvalidArgument when `deterministic` is asked of others: a library rounds as it likes.
    """
    name = config.kernels
    if name == "auto":
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        fits = model.head_dim in (32, 64, 128, 256) and config.page_tokens == 64 and model.d % 8 == 0
        name = "cuda" if hopper and fits and dtype != torch.float32 else "eager"
    if config.deterministic and name != "cuda":
        raise InvalidArgument(f"needs the cuda kernels, not {name!r}", field="deterministic")
    return name


def resolve_chaos(config: EngineConfig, fault: Fault | None) -> Chaos | None:
    """The chaos meant by `chaos`; None where it is empty. Raises InvalidArgument for one beside a `fault`."""
    if not config.chaos:
        return None
    if fault is not None:
        raise InvalidArgument("cannot be had together with a fault of one's own", field="chaos")
    return Chaos.parse(config.chaos)


def make_link(pool: torch.Tensor, arena: HostArena, clock: Clock, fault: Fault | None, chaos: Chaos | None) -> Mover:
    """The mover between the tiers, with what makes its copies fail or come late."""
    if chaos is None:
        return _make_mover(pool, arena, fault)
    return SlowMover(_make_mover(pool, arena, chaos), chaos.delay, clock)


def _make_mover(pool: torch.Tensor, arena: HostArena, fault: Fault | None) -> Mover:
    if not pool.is_cuda:
        return SyncMover(pool, arena.tensor, fault)
    # Only CUDA machines have the driver that it calls.
    from mtserve.transfer.cuda_mover import CudaMover

    return CudaMover(pool, arena.tensor, fault, chunk_pages=arena.chunk_pages)


def page_shape(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> PageShape:
    """The geometry of one page of the states of this model, which computes in `dtype`."""
    kept = FP8 if config.gpu_format == "fp8" else dtype
    return PageShape(model.layers, config.page_tokens, model.heads, model.head_dim, kept)


def device_pages(config: EngineConfig, page_bytes: int, device: torch.device) -> int:
    """Pages of the GPU tier, of `page_bytes` each. Raises ResourceExhausted when not one fits."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    text = AUTO_CACHE[device.type] if config.gpu_cache == "auto" else config.gpu_cache
    size = parse_capacity(text, of=free, field="gpu_cache")
    pages = size // page_bytes
    if pages < 1:
        raise ResourceExhausted(
            f"{format_bytes(size)} holds no page; one page of {config.page_tokens} tokens takes {format_bytes(page_bytes)}",
            field="gpu_cache",
        )
    return pages


def arena_pages(config: EngineConfig, page_bytes: int) -> int:
    """Pages of the host tier, of `page_bytes` each; 0 turns it off. Raises ResourceExhausted for more than is available.

    Memory is taken as the arena grows; too much of it would end the process then, not the call that asked for it.
    """
    available = available_memory()
    size = parse_capacity(config.host_cache, of=available, field="host_cache")
    if size > available:
        raise ResourceExhausted(
            f"{format_bytes(size)} is above the {format_bytes(available)} of host memory that are available",
            field="host_cache",
        )
    return size // page_bytes


def available_memory() -> int:
    """Bytes of host memory that are free or reclaimable."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
