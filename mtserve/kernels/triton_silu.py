"""SiLU inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def silu(x, APPROXIMATE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    # SiLU(x) = h (tanh(h) + 1) with h = x / 2: one special-function instruction instead of two.
    half = 0.5 * x
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * half)) - 1.0
    return half * tanh + half
