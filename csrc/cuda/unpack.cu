// K and V from packed pages that keep them in int8, a peak a token and head: code * (peak / 127), rounded once.
//
// A layer's K, and its V, of one page are 64 * H * D values side by side in both forms, and the peak of value i is
// the (i / D)-th: one thread block makes one of them. Works for any H and any D that is a multiple of 8.
//
//   FP16   0 bf16, 1 fp16

#include "hopper.cuh"
#include "unpack.cuh"

constexpr int THREADS = 256;
constexpr int VALUES = 8;   // of a thread at a time: 16 bytes of the pool

extern "C" __global__ void __launch_bounds__(THREADS) unpack_codes(const __grid_constant__ Params p) {
    let_next_start();
    await_kernels_before();
    const int side = blockIdx.x & 1, unit = blockIdx.x >> 1, layers = p.last - p.first;
    const int layer = p.first + unit % layers;
    const long long page = p.pages[unit / layers];
    const int values = PAGE * p.width;   // of a side
    const unsigned char* from = p.packed + page * p.page_bytes + (long long)layer * p.layer_bytes;
    const unsigned char* peaks = from + p.peaks_offset + (long long)side * (values / p.head_dim) * 2;
    const unsigned char* codes = from + (long long)side * values;
    Elem* to = p.pool + page * p.page_stride + layer * p.layer_stride + (long long)side * values;
#pragma unroll 4
    for (int i = threadIdx.x * VALUES; i < values; i += THREADS * VALUES) {
        const uint2 words = __ldcg(reinterpret_cast<const uint2*>(codes + i));
        const float step = __fdiv_rn(load_peak(peaks + 2 * (i / p.head_dim)), 127.0f);
        const u32 pairs[4] = {elements_of_bytes<0>(words.x), elements_of_bytes<1>(words.x),
                              elements_of_bytes<0>(words.y), elements_of_bytes<1>(words.y)};
        u32 x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 pair = unpack(pairs[j]);
            x[j] = pack(pair.x * step, pair.y * step);
        }
        *reinterpret_cast<uint4*>(to + i) = make_uint4(x[0], x[1], x[2], x[3]);
    }
}
