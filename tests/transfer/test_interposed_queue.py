"""What GPU tests put between a mover's queue and the driver (tests/gpu/gpu_driver.py), over a driver that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# In a process of its own: there is no way back from that driver.
SCRIPT = """
import pathlib, sys
import null_driver
null_driver.install(pathlib.Path(sys.argv[1]))
import numpy as np
import torch
from gpu_driver import STRIDED, in_step, interpose
from mtserve.cache.index import Copy
from mtserve.kernels.cuda.driver import batch_name
from mtserve.transfer import cuda_mover
from mtserve.transfer.mover import LOAD

cuda_mover.STRIDED_BYTES = cuda_mover.GROUPED_LOAD_BYTES = cuda_mover.GROUPED_PIECE_BYTES = 1
PAGE, LAYERS = 4096, 4
pool, arena = (torch.zeros(32, LAYERS, PAGE // LAYERS, dtype=torch.uint8) for _ in range(2))
mover = cuda_mover.CudaMover(pool, arena, chunk_pages=16)
for lane in mover._lanes.values():
    in_step(lane.queue)
seen, refused = [], []

def before(copies):
    ends = (copies.to - pool.data_ptr(), copies.source - arena.data_ptr(), copies.spans)
    seen.append((copies.name, *(each.tolist() for each in ends)))
    return refused.pop() if refused else 0

def submitted(inside, outside):
    seen.clear()
    mover.submit(LOAD, [Copy(1, "", *(np.array(each, dtype=np.int32) for each in (inside, outside)), 0, 0)])
    assert mover.wait(5)
    (finished,) = mover.poll()
    return finished.error

interpose(mover, LOAD, before)
assert submitted([4, 5, 6], [8, 9, 10]) is None
width = PAGE // LAYERS
assert seen == [
    (STRIDED, [4 * PAGE + layer * width], [8 * PAGE + layer * width], [2 * PAGE + width]) for layer in range(LAYERS)
], seen
cuda_mover.GROUPED_LOAD_BYTES = 1 << 30
assert submitted([1, 2, 7], [3, 4, 5]) is None
assert seen == [(batch_name(), [PAGE, 7 * PAGE], [3 * PAGE, 5 * PAGE], [2 * PAGE, PAGE])], seen
refused.append(1)
assert "cuMemcpyBatchAsync: error 1" in str(submitted([1], [1]))
assert submitted([1], [1]) is None
"""


def test_it_sees_each_copy_and_may_refuse_it(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", ROOT / "tests" / "gpu")))
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
