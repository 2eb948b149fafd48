// What our Hopper kernels share: types, barriers, bulk tensor copies, wgmma's ordering, arithmetic. No headers of its own,
// so that NVRTC can build it; a kernel's text includes it, and the builder puts it in its place.
//
//   FP16        0 bf16, 1 fp16: what an Elem is
//   SPIN_LIMIT  0. For debugging: polls after which a barrier gives up, so that a hang becomes a wrong result.

#ifndef FP16
#define FP16 0
#endif
#ifndef SPIN_LIMIT
#define SPIN_LIMIT 0
#endif

using u32 = unsigned int;
using u64 = unsigned long long;
using Elem = unsigned short;  // the bits of one element

#if FP16
#define ELEM_NAME "f16"
#else
#define ELEM_NAME "bf16"
#endif

struct alignas(64) TensorMap { u64 opaque[16]; };

// ---- PTX ------------------------------------------------------------------------------------
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared::cta.b64 t, [%0];\n}\n" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;\n}\n" ::"r"(bar), "r"(bytes)
                 : "memory");
}
// Returns once the phase of this parity has completed (parity 1 of a fresh barrier counts as complete).
// No trap in the loop: with one, ptxas ignores setmaxnreg.
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    u32 done;
#if SPIN_LIMIT
    u32 polls = 0;
#endif
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done) : "r"(bar), "r"(parity) : "memory");
#if SPIN_LIMIT
        if (++polls > SPIN_LIMIT) break;
#endif
    } while (!done);
}
__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 bar, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"((u64)map), "r"(bar), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Programmatic dependent launch: the next kernel of the stream may start once every thread block has said so (or
// has ended), and must itself await the kernels before it ahead of reading what they wrote. Both do nothing in a
// launch without that attribute.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void await_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The value of lane 0, which the compiler then knows to be the same for the whole warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Operand names, 16 at a time.
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// ---- arithmetic -----------------------------------------------------------------------------
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn." ELEM_NAME "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ float2 unpack(u32 packed) {
#if FP16
    float2 f;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n"
        : "=f"(f.x), "=f"(f.y) : "r"(packed));
    return f;
#else
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
#endif
}
// SiLU(x) = h (tanh(h) + 1) with h = x / 2: one approximate instruction instead of an exponential and a division.
__device__ __forceinline__ float silu_of_half(float h) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(h));
    return fmaf(h, t, h);
}
