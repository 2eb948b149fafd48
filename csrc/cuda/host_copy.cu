// A small copy between pinned host memory and the device by a few thread blocks, whichever side either end is on.
//
// The copy engine of a direction takes what all streams gave it in order: what a batch brings, a few hundred KB, would
// lie behind every load under way, and its scores behind every write-back (measured: 8.7 ms behind 512 MiB). Reads and
// writes of a kernel share the link with them instead.
#include "hopper.cuh"

constexpr int THREADS = 256, TOGETHER = 4;  // 16-byte words of a thread in flight

__device__ __forceinline__ uint4 load_word(const uint4* from) {
    uint4 word;  // volatile: the host has written there since the last launch
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w) : "l"(from) : "memory");
    return word;
}

extern "C" __global__ void __launch_bounds__(THREADS) host_copy(uint4* to, const uint4* from, int words) {
    await_kernels_before();
    for (int first = blockIdx.x * THREADS * TOGETHER + threadIdx.x; first < words; first += gridDim.x * THREADS * TOGETHER) {
        uint4 held[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
            if (first + i * THREADS < words) held[i] = load_word(from + first + i * THREADS);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
            if (first + i * THREADS < words) to[first + i * THREADS] = held[i];
    }
}
