// Matrix product with its epilogue, for Hopper (sm_90a): A [T, K] B [K, N], both row-major, sums in fp32.
//
//   EPILOGUE 0, projection   C = SiLU(A B + bias), and C's k and v of rows with a target go into their pages
//   EPILOGUE 1, residual     C = C + A B, rounded once
//
// A persistent grid; thread block b takes the tiles b, b + grid, ... One producer warp brings A and B by
// bulk tensor copies into a ring of stages of 64 k each. Two consumer warpgroups take alternate tiles:
//
//   tensor cores   | tile 0 (first) | tile 1 (second) | tile 2 (first) | ...
//   first          | products       | epilogue        | products       | ...
//   second         | waits          | products        | epilogue       | ...
//
// so that the tensor cores are busy during every epilogue. A tile's sums run over k in steps of 16 from 0
// upwards, whatever the tile: a row's result depends on that row alone, bit by bit.
//
// Copies are boxes of 64 x 64 elements, swizzled over 128 bytes; what lies outside a matrix reads as zero
// and is not written. So N and K need only be multiples of 8, and T of nothing.
//
// Builds with `nvcc -gencode=arch=compute_90a,code=sm_90a --cubin` and with NVRTC: no headers.
//   EPILOGUE      0 projection, 1 residual
//   FP16          0 bf16, 1 fp16
//   FP8_PAGES     0. 1, projection only: k and v are rounded to e4m3, in C too, and pages hold them as bytes
//   TILE_ROWS, TILE_COLUMNS: see product.cuh
//   SPIN_LIMIT    0. For debugging: polls after which a barrier gives up, so that a hang becomes a wrong result.

#ifndef EPILOGUE
#define EPILOGUE 0
#endif

#ifndef FP8_PAGES
#define FP8_PAGES 0
#endif

#include "hopper.cuh"
#include "fp8.cuh"
#include "product.cuh"

constexpr int BAND = 8;                           // see `Tiles`
constexpr int OLD_FULL = OTHERS;                  // [2]: the old C has arrived in a consumer's tile
constexpr int SHARED_END = OLD_FULL + 16;
// Dynamic shared memory to ask for: 1024 more, to align the start.
extern "C" __device__ const int product_shared_bytes = SHARED_END + 1024;

static_assert(EPILOGUE == 0 || EPILOGUE == 1, "EPILOGUE");
static_assert(EPILOGUE == 0 || !FP8_PAGES, "FP8_PAGES");
static_assert(SHARED_END + 1024 <= SHARED_LIMIT, "a block of sm_90 has at most 227 KiB");

// Registers after setmaxnreg: (40 + 2 * 232) * 128 = 168 * 384, of which the launch gives 168 to each thread.
constexpr int PRODUCER_REGS = 40, CONSUMER_REGS = 232;

#if FP8_PAGES
using Kept = unsigned char;
#else
using Kept = Elem;
#endif

// Mirrored by `Params` in mtserve/kernels/product/cuda.py. Offsets and strides count elements.
struct Params {
    const Elem* bias;       // [N]; projection only, like all down to layer_offset
    const int* target;      // [T]: 64 * page + offset, negative: not kept
    Kept* pages;            // null: nothing is kept
    long long page_stride;
    long long layer_offset; // of the layer's K in a page; V follows 64 * width on
    int width;              // N = 4 * width: u, v, q, k
    int rows;               // T
    int columns;            // N
    int depth;              // K
};

// ---- PTX ------------------------------------------------------------------------------------
__device__ __forceinline__ void store_box(const TensorMap* map, u32 from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"((u64)map), "r"(from), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns once this thread's stores have read shared memory.
__device__ __forceinline__ void stores_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// The order of the tiles: bands of a few tiles down, all columns across, the rows of a band fastest. Tiles
// in work at the same time so share what they read of A and of B, and A comes from memory once.
struct Tiles {
    int down, across, count;

    __device__ __forceinline__ explicit Tiles(const Params& p) {
        down = (p.rows + TILE_ROWS - 1) / TILE_ROWS;
        across = (p.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
        count = down * across;
    }
    __device__ __forceinline__ void place(int tile, int& row, int& column) const {
        const int band = tile / (BAND * across), in_band = tile - band * BAND * across;
        const int height = min(BAND, down - band * BAND);
        const int strip = in_band / height;
        row = (band * BAND + in_band - strip * height) * TILE_ROWS;
        column = strip * TILE_COLUMNS;
    }
};

// ---- producer: one thread -------------------------------------------------------------------
struct Producer {
    const TensorMap* a_map;
    const TensorMap* b_map;
    const Params& p;
    u32 smem;
    Tiles tiles;

    __device__ __forceinline__ void load_a(u32 stage, int row, int k) const {
        const u32 at = smem + stage * STAGE_BYTES, full = smem + FULL + 8 * stage;
#pragma unroll
        for (int half = 0; half < HALVES; ++half) load_box(at + half * BOX_BYTES, a_map, full, k, row + half * BOX);
    }

    __device__ __forceinline__ void run() const {
        int row, column;
        tiles.place(blockIdx.x, row, column);
        // B is constant: as much of the first tile's as there is room for comes while the kernels before this end.
        const int early = min(p.depth, STAGES * BOX);
        for (int k = 0; k < early; k += BOX) load_b(smem, b_map, k / BOX, STAGE_BYTES, column, k);
        await_kernels_before();
        Ring ring;
        for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
            tiles.place(tile, row, column);
            for (int k = 0; k < p.depth; k += BOX) {
                if (tile != blockIdx.x || k >= early) {
                    barrier_wait(smem + EMPTY + 8 * ring.stage, ring.phase ^ 1);
                    load_b(smem, b_map, ring.stage, STAGE_BYTES, column, k);
                }
                load_a(ring.stage, row, k);
                ring.advance();
            }
        }
    }
};

// ---- consumers ------------------------------------------------------------------------------
struct Consumer : Multiplier {
    const TensorMap* c_map;
    const Params& p;

    __device__ __forceinline__ Consumer(const TensorMap* c_map, const Params& p, u32 smem)
        : Multiplier(smem), c_map(c_map), p(p) {}
    __device__ __forceinline__ bool leads() const { return (threadIdx.x & 127) == 0; }
    __device__ __forceinline__ void sync() const { named_sync(1 + group, 128); }

#if EPILOGUE == 0
    // A warp writes its quarter of the tile's rows, 8 columns a lane; `width` is a multiple of those 8 columns.
    static constexpr int PAGE = 64;   // tokens
    static constexpr int WARP_ROWS = TILE_ROWS / WARPS, VECTORS = TILE_COLUMNS / 8, AT_ONCE = 32 / VECTORS;
    // Of row `lane` of the warp's.
    __device__ __forceinline__ int load_target(int row) const {
        const int mine = row + warp * WARP_ROWS + lane;
        return p.pages && lane < WARP_ROWS && mine < p.rows ? __ldg(p.target + mine) : -1;
    }
    __device__ __forceinline__ void write_pages(int target, int column) const {
        const int vector = lane % VECTORS, x = column + 8 * vector, part = x / p.width;   // 0 u, 1 v, 2 q, 3 k
        const bool state = part == 1 || part == 3;
        if (!__any_sync(~0u, state) || !__any_sync(~0u, target >= 0)) return;
        Kept* to = p.pages + p.layer_offset + (part == 3 ? 0 : (long long)PAGE * p.width) + (x - part * p.width);
        const u32 from = c_tile + (vector / 8) * STRIP_BYTES;
#pragma unroll 4
        for (int i = 0; i < WARP_ROWS; i += AT_ONCE) {
            const int in_warp = i + lane / VECTORS, row = warp * WARP_ROWS + in_warp;
            const int place = __shfl_sync(~0u, target, in_warp);
            if (state && place >= 0) {
                const uint4 x8 = load_vector(from + row * ROW_BYTES + (((vector ^ row) & 7) * 16));
                const long long offset = (place / PAGE) * p.page_stride + (long long)(place % PAGE) * p.width;
#if FP8_PAGES
                *reinterpret_cast<uint2*>(to + offset) = make_uint2(narrow(x8.x, x8.y), narrow(x8.z, x8.w));
#else
                *reinterpret_cast<uint4*>(to + offset) = x8;
#endif
            }
        }
    }
#else
    // The old C, into shared memory that is free again. Only the leading thread comes here.
    __device__ __forceinline__ void load_old(int row, int column) const {
        const u32 full = smem + OLD_FULL + 8 * group;
        barrier_expect(full, C_BYTES);
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
                load_box(c_tile + strip * STRIP_BYTES + half * BOX_BYTES, c_map, full, column + strip * BOX,
                         row + half * BOX);
    }
    // A warp reads and writes the same elements, so that nobody else's are in the way.
    __device__ __forceinline__ void to_tile(const float (&sum)[HALVES][SUMS]) const {
        const u32 at = matrices_at();
#pragma unroll
        for (int g = 0; g < TILE_COLUMNS / 8; g += 2) {
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                u32 x[4];
                load_matrices(x, at + in_strip(half, g));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* s = sum[half] + 4 * g + 2 * i;
                    const float2 old = unpack(x[i]);
                    x[i] = pack(old.x + s[0], old.y + s[1]);
                }
                store_matrices(at + in_strip(half, g), x);
            }
        }
    }
#endif

    __device__ __forceinline__ void store_tile(int row, int column) const {
        fence_async_proxy();
        sync();
        if (!leads()) return;
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
                if (row + half * BOX < p.rows && column + strip * BOX < p.columns)
                    store_box(c_map, c_tile + strip * STRIP_BYTES + half * BOX_BYTES, column + strip * BOX,
                              row + half * BOX);
        stores_commit();
    }

    __device__ __forceinline__ void run() {
        const Tiles tiles(p);
        const int stages = (p.depth + BOX - 1) / BOX;   // of a tile
        if (group == 1) ring.skip(stages);
#if EPILOGUE == 1
        // For the old C. All else that others may have written or read comes after a stage, and the producer waits.
        if (leads()) await_kernels_before();
#endif
        u32 turn = 0;
        for (int tile = blockIdx.x + group * gridDim.x; tile < tiles.count; tile += 2 * gridDim.x, ++turn) {
            int row, column;
            tiles.place(tile, row, column);
            // All that can be had before the products is had before them: this warpgroup waits for its turn.
            if (leads()) stores_wait();
#if EPILOGUE == 0
            u32 bias[TILE_COLUMNS / 8];
            load_bias(bias, p.bias, column, p.columns);
            const int target = load_target(row);
            sync();
#else
            if (leads()) load_old(row, column);
#endif
            float sum[HALVES][SUMS];
            multiply(sum, p.depth, (turn + 1 + group) & 1);   // the first one's first turn waits for nobody
#if EPILOGUE == 0
            float half[HALVES][2];
#pragma unroll
            for (int i = 0; i < 2 * HALVES; ++i) half[i / 2][i % 2] = 0.5f;
            // Whoever attends to a row sees what its page holds of it, in this batch as in later ones.
            silu_to_tile(sum, bias, half, [&](int g, float low, float high) {
                const int x = column + 8 * g;
                const bool state = (x >= p.width && x < 2 * p.width) || x >= 3 * p.width;
                return FP8_PAGES && state ? pack_rounded(low, high) : pack(low, high);
            });
            store_tile(row, column);
            write_pages(target, column);
#else
            barrier_wait(smem + OLD_FULL + 8 * group, turn & 1);
            to_tile(sum);
            store_tile(row, column);
#endif
            __syncwarp();
            ring.skip(stages);   // the other consumer's
        }
        if (leads()) stores_wait();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
            const __grid_constant__ TensorMap c, const __grid_constant__ Params p) {
    extern __shared__ unsigned char raw[];
    const u32 smem = (shared_address(raw) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        let_next_start();
        for (int i = 0; i < STAGES; ++i)
            barrier_init(smem + FULL + 8 * i, 1), barrier_init(smem + EMPTY + 8 * i, WARPS);
        for (int i = 0; i < 2; ++i)
            barrier_init(smem + TURN + 8 * i, WARPS), barrier_init(smem + OLD_FULL + 8 * i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&a) : "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&b) : "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&c) : "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        if (threadIdx.x == 0) {
            const Producer producer{&a, &b, p, smem, Tiles(p)};
            producer.run();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
        Consumer consumer(&c, p, smem);
        consumer.run();
    }
}
