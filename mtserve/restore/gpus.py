"""What models cost on GPUs that somebody has measured, so that a machine can be foretold before it is bought.

An engine calibrates itself for one shape of model (mtserve/engine/calibration.py). Here are a few rates of a GPU from
which the same costs follow for any shape. scripts/gpu_figures.py fits them to the benchmarks' results and says how far
they are off.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtserve.config import ModelConfig
from mtserve.errors import InvalidArgument
from mtserve.restore.costs import Costs


@dataclass(frozen=True)
class GpuFigures:
    """Rates of one GPU and its host, for states of 16 bits and the kernels that are fastest there.

    A layer takes `layer_s`, beside that `product_s` for each FLOP of its two products and `attention_s` for each of its
    attention, over pages of a byte a value `fp8_attention` times as long. A batch takes `batch_s` and, of the loop, `request_s` a request and `plan_row_s` a row. Loads take
    `load_s` and their bytes over `link_bytes_per_s`; what comes packed, `unpack_s` more for each value of K and V.
    `error`: mean |predicted - measured| / measured of the restored batches that the benchmark let the engine decide.
    """

    name: str
    source: str
    date: str
    layer_s: float
    product_s: float
    attention_s: float
    fp8_attention: float
    batch_s: float
    request_s: float
    plan_row_s: float
    link_bytes_per_s: float
    load_s: float
    unpack_s: float
    error: float

    def costs(self, model: ModelConfig, *, packed: bool, fp8: bool = False) -> Costs:
        """Of batches of `model`. `packed`: the host keeps something smaller than the states, which is unpacked.

        `fp8`: pages are of a byte a value.
        """
        width = model.heads * model.head_dim
        return Costs(
            link=((1, self.link_bytes_per_s), (2, self.link_bytes_per_s)),
            load_s=self.load_s,
            batch_s=self.batch_s,
            layer_s=self.layer_s,
            row_s=product_flop(model) * self.product_s,
            pair_s=4 * width * self.attention_s * (self.fp8_attention if fp8 else 1.0),
            unpack_s=2 * width * self.unpack_s if packed else 0.0,
            plan_row_s=self.plan_row_s,
        )


def product_flop(model: ModelConfig) -> int:
    """FLOP of one row in a layer's two products: d to 4 H D, and H D back to d."""
    return 10 * model.d * model.heads * model.head_dim


GPUS = {
    "h200": GpuFigures(
        name="NVIDIA H200",
        source="benchmarks/results/forward.json, restore.json and gpu_format.json: bfloat16, PCIe 5 x16, 16 cores",
        date="2026-11-23",
        layer_s=2.3e-05, product_s=2.3e-15, attention_s=1.59e-15, fp8_attention=1.38,
        batch_s=3.16e-04, request_s=3.09e-05, plan_row_s=2.34e-08,
        link_bytes_per_s=52.6e9, load_s=4e-4, unpack_s=2.5e-12, error=0.049,
    ),
}  # fmt: skip


def gpu_figures(name: str) -> GpuFigures:
    """Those of the GPU called `name`. Raises InvalidArgument listing the known ones."""
    if name not in GPUS:
        raise InvalidArgument(f"{name!r} is not one of {', '.join(GPUS)}", field="gpu")
    return GPUS[name]
