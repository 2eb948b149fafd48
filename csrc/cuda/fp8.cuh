// Numbers of one byte (e4m3) and ours: both ways of what mtserve/kernels/page_write/rounding.py says in torch. Included
// behind hopper.cuh. Every finite e4m3 number is one of bf16 and of fp16.

// Rounds two numbers to e4m3, half to even, what is larger to 448; NaN stays NaN. `low` in the low byte.
__device__ __forceinline__ u32 to_fp8(float low, float high) {
    unsigned short packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}
// Two numbers, rounded to e4m3, as Elems.
__device__ __forceinline__ u32 pack_rounded(float low, float high) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)to_fp8(low, high)));
#if FP16
    return halves;
#else
    float2 f;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n"
        : "=f"(f.x), "=f"(f.y) : "r"(halves));
    return pack(f.x, f.y);
#endif
}
// Four Elems that e4m3 holds, in two words, as four bytes.
__device__ __forceinline__ u32 narrow(u32 first, u32 second) {
    const float2 a = unpack(first), b = unpack(second);
    return to_fp8(a.x, a.y) | to_fp8(b.x, b.y) << 16;
}
// Two of the four bytes in `x`, the upper ones or the lower, as Elems. In bf16 a NaN comes back as 480.
//   bf16: the byte sign-extended to 16 bits and moved up by 4 has exponent and fraction where bf16 has them and, but for
//   the bits of the mask, the sign; as bf16 that is the number over 2^120, subnormals too, and the product is exact.
template <bool UPPER>
__device__ __forceinline__ u32 widen(u32 x) {
    u32 pair;
#if FP16
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((unsigned short)(UPPER ? x >> 16 : x)));
#else
    // Selectors 8 + i are the sign of byte i, eight times.
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(pair) : "r"(x), "n"(UPPER ? 0xb3a2 : 0x9180));
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"((pair << 4) & 0x87f087f0u), "r"(0x7b807b80u));
#endif
    return pair;
}
