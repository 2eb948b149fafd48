// K and V from packed pages that keep the layers' inputs, for Hopper (sm_90a): SiLU(A B + bias), where A is the inputs'
// rows of a page, B [depth, 2 width] the layer's weights of v and k, and the result lies in the pool's pages.
//
// A persistent grid over all tiles of a list of pages and a range of layers; a tile is two pages' rows by 128 columns
// of one layer, and thread block b takes the tiles b, b + grid, ... Two consumer warpgroups take alternate tiles, as in
// product.cu. The producer is a whole warpgroup: it reads A's codes, 16 bytes a thread and two stages ahead in
// registers, makes elements of them and writes these where the tensor cores read, while bulk copies bring B.
//
//   int8   the codes are A, exactly; a row's scale peak / 127 comes to its sums
//   int4   A is code * (peak / 7), a peak every 32 values, rounded to an element
//
// What lies behind depth reads as zero in A, and so in B, which has zero rows there. Where the pages are odd in number,
// the last tile's second half is the first once more, and is not written.
//
//   BITS        8 | 4
//   FP16        0 bf16, 1 fp16
//   LOAD_BYTES  16 | 8: int8 rows of a depth that is not a multiple of 16 start at multiples of 8 bytes
//   SPIN_LIMIT  see hopper.cuh

#ifndef BITS
#define BITS 8
#endif
#ifndef LOAD_BYTES
#define LOAD_BYTES 16
#endif
#define TILE_ROWS 128
#define TILE_COLUMNS 128

#include "hopper.cuh"
#include "product.cuh"
#include "unpack.cuh"

constexpr int CODES = 128 / BITS;             // of the 16 bytes that a thread reads at once
constexpr int CHUNKS = CODES / 8;             // of 16 bytes each, of the elements that these become
constexpr int LANES = BOX / CODES;            // threads of a row
constexpr int ROWS_AT_ONCE = 128 / LANES;     // of the producer
constexpr int LOADS = TILE_ROWS / ROWS_AT_ONCE;
constexpr int B_BYTES = STAGE_BYTES - A_BYTES;
constexpr int SHARED_END = OTHERS;
// Dynamic shared memory to ask for: 1024 more, to align the start.
extern "C" __device__ const int rebuild_shared_bytes = SHARED_END + 1024;

static_assert(BITS == 8 || BITS == 4, "BITS");
static_assert(LOAD_BYTES == 16 || (LOAD_BYTES == 8 && BITS == 8), "LOAD_BYTES");
static_assert(SHARED_END + 1024 <= SHARED_LIMIT, "a block of sm_90 has at most 227 KiB");

// Registers after setmaxnreg: (88 + 2 * 208) * 128 = 168 * 384, of which the launch gives 168 to each thread.
constexpr int PRODUCER_REGS = 88, CONSUMER_REGS = 208;

__device__ __forceinline__ void store_vector(u32 to, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// Past L1, and with the 256 bytes around: the row's next stages then come from L2.
__device__ __forceinline__ uint4 load_codes(const unsigned char* from) {
    uint4 x;
    asm volatile("ld.global.cg.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}
__device__ __forceinline__ uint2 load_half_codes(const unsigned char* from) {
    uint2 x;
    asm volatile("ld.global.cg.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
    return x;
}

// What a tile is of: two pages, of which each is a half, and 128 columns of a layer.
struct Place {
    int layer, pair, column;

    __device__ __forceinline__ int page(const Params& p, int half) const {
        return p.pages[min(2 * pair + half, p.count - 1)];
    }
    __device__ __forceinline__ const unsigned char* packed(const Params& p, int half) const {
        return p.packed + page(p, half) * p.page_bytes + (long long)layer * p.layer_bytes;
    }
};

// The order of the tiles: all columns of two pages, then the next two, layer after layer. Tiles in work at the same
// time so share what they read, and a layer's B stays in L2.
struct Tiles {
    int pairs, across, count;

    __device__ __forceinline__ explicit Tiles(const Params& p) {
        pairs = (p.count + 1) / 2;
        across = (2 * p.width + TILE_COLUMNS - 1) / TILE_COLUMNS;
        count = (p.last - p.first) * pairs * across;
    }
    __device__ __forceinline__ Place place(const Params& p, int tile) const {
        const int rows = tile / across, layer = rows / pairs;
        return {p.first + layer, rows - layer * pairs, (tile - rows * across) * TILE_COLUMNS};
    }
};

// ---- producer: a warpgroup ------------------------------------------------------------------
// A thread's codes of a stage, those of row ROWS_AT_ONCE * i + its own at i.
struct Codes {
    uint4 words[LOADS];
#if BITS == 4
    float peaks[LOADS];
#endif
};

#if BITS == 4
// Two of a word's eight codes: the four bits more 8, under the byte that makes them 136 + code in bf16 (1032 + code in
// fp16). Times the scale, which two elements hold: high is the nearest, low what is left.
template <int PAIR>
__device__ __forceinline__ u32 scaled(u32 word, u32 high, u32 low) {
    const u32 x = __byte_perm(word, word >> 4, PAIR | PAIR << 4 | (PAIR + 4) << 8 | (PAIR + 4) << 12);
    const u32 code = difference((x & 0x000f000fu) | (MAGIC & 0xff00ff00u), (MAGIC & 0xff00ff00u) | 0x00080008u);
    u32 y;
    asm("{\n.reg .b32 t;\n"
        "mul.rn." ELEM_NAME "x2 t, %1, %3;\n"
        "fma.rn." ELEM_NAME "x2 %0, %1, %2, t;\n}\n"
        : "=r"(y) : "r"(code), "r"(high), "r"(low));
    return y;
}
#endif

struct Producer {
    const TensorMap* b_map;
    const Params& p;
    u32 smem;
    Tiles tiles;
    int row, part;            // this thread's first row of a tile, and which of the row's codes are its own
    // Where it reads next, two stages ahead of where it writes.
    int next_tile, next_k;
    const unsigned char* next[2];   // this thread's codes in each page
#if BITS == 4
    const unsigned char* next_peaks[2];
#endif

    __device__ __forceinline__ Producer(const TensorMap* b_map, const Params& p, u32 smem)
        : b_map(b_map), p(p), smem(smem), tiles(p) {
        row = threadIdx.x / LANES;
        part = threadIdx.x % LANES;
        next_k = 0;
        next_tile = blockIdx.x;
        place_next();
    }
    __device__ __forceinline__ void place_next() {
        if (next_tile >= tiles.count) return;
        const Place place = tiles.place(p, next_tile);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned char* layer = place.packed(p, half);
            next[half] = layer + row * (p.depth * BITS / 8) + part * 16;
#if BITS == 4
            next_peaks[half] = layer + p.peaks_offset + (row * (p.depth / CODES) + part) * 2;
#endif
        }
    }

    // The codes of the next stage; zero behind depth and behind the last tile.
    __device__ __forceinline__ void read(Codes& codes) {
        const int k = next_k + part * CODES;
        const bool some = next_tile < tiles.count && k < p.depth;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int half = i * ROWS_AT_ONCE / PAGE, down = i * ROWS_AT_ONCE % PAGE;
            const unsigned char* from = next[half] + down * (p.depth * BITS / 8) + next_k * BITS / 8;
            codes.words[i] = make_uint4(0, 0, 0, 0);
#if LOAD_BYTES == 16
            if (some) codes.words[i] = load_codes(from);
#else
            if (some) {
                const uint2 x = load_half_codes(from);
                codes.words[i].x = x.x, codes.words[i].y = x.y;
            }
            if (some && k + 8 < p.depth) {
                const uint2 x = load_half_codes(from + 8);
                codes.words[i].z = x.x, codes.words[i].w = x.y;
            }
#endif
#if BITS == 4
            const unsigned char* peak = next_peaks[half] + (down * (p.depth / CODES) + next_k / CODES) * 2;
            codes.peaks[i] = some ? load_peak(peak) : 0.0f;
#endif
        }
        next_k += BOX;
        if (next_k < p.depth) return;
        next_k = 0;
        next_tile += gridDim.x;
        place_next();
    }

    // Their elements, into A of a stage: rows of 128 bytes, whose 16-byte chunks are swizzled by the row.
    __device__ __forceinline__ void write(const Codes& codes, u32 stage) const {
        const u32 at = smem + stage * STAGE_BYTES + row * ROW_BYTES + (((part * CHUNKS) ^ (row & 7)) * 16);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const u32 words[4] = {codes.words[i].x, codes.words[i].y, codes.words[i].z, codes.words[i].w};
#if BITS == 4
            const float scale = codes.peaks[i] * (1.0f / 7.0f);
            const u32 high = pack(scale, scale);
            const float rest = scale - unpack(high).x;
            const u32 low = pack(rest, rest);
#endif
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#if BITS == 8
                const u32 a = words[2 * chunk], b = words[2 * chunk + 1];
                const u32 x[4] = {elements_of_bytes<0>(a), elements_of_bytes<1>(a), elements_of_bytes<0>(b),
                                  elements_of_bytes<1>(b)};
#else
                const u32 a = words[chunk] ^ 0x88888888u;
                const u32 x[4] = {scaled<0>(a, high, low), scaled<1>(a, high, low), scaled<2>(a, high, low),
                                  scaled<3>(a, high, low)};
#endif
                store_vector((at ^ (chunk * 16)) + i * ROWS_AT_ONCE * ROW_BYTES, x);
            }
        }
    }

    // A stage is full once B has come and every warp has written its part of A.
    __device__ __forceinline__ void step(Codes& codes, const Ring& ring, const Place& place, int k) {
        barrier_wait(smem + EMPTY + 8 * ring.stage, ring.phase ^ 1);
        if (threadIdx.x == 0) load_b(smem, b_map, ring.stage, B_BYTES, place.column, b_row(place, k));
        write(codes, ring.stage);
        fence_async_proxy();
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(smem + FULL + 8 * ring.stage);
        read(codes);
    }
    // Each layer's rows of B begin at a multiple of BOX.
    __device__ __forceinline__ int b_row(const Place& place, int k) const {
        return place.layer * ((p.depth + BOX - 1) / BOX * BOX) + k;
    }

    __device__ __forceinline__ void run() {
        Codes even, odd;
        read(even);
        read(odd);
        Ring ring;
        int tile = blockIdx.x, k = 0;
        Place place = tiles.place(p, tile);
        const auto advance = [&] {
            ring.advance();
            k += BOX;
            if (k < p.depth) return;
            k = 0;
            tile += gridDim.x;
            place = tiles.place(p, tile);
        };
        while (tile < tiles.count) {
            step(even, ring, place, k);
            advance();
            if (tile >= tiles.count) break;
            step(odd, ring, place, k);
            advance();
        }
    }
};

// ---- consumers ------------------------------------------------------------------------------
struct Consumer : Multiplier {
    const Params& p;

    __device__ __forceinline__ Consumer(const Params& p, u32 smem) : Multiplier(smem), p(p) {}

    // Half of what the sums of the thread's rows are to be multiplied by: see `silu_to_tile`.
    __device__ __forceinline__ void load_scales(float (&half_scale)[HALVES][2], const Place& place) const {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
#if BITS == 8
            const unsigned char* peaks = place.packed(p, half) + p.peaks_offset + (warp * 16 + lane / 4) * 2;
            half_scale[half][0] = load_peak(peaks) * (0.5f / 127.0f);
            half_scale[half][1] = load_peak(peaks + 16) * (0.5f / 127.0f);
#else
            half_scale[half][0] = half_scale[half][1] = 0.5f;
#endif
        }
    }

    // The rows that this warp made, 16 bytes a lane; `width` is a multiple of those 8 columns.
    __device__ __forceinline__ void write_pages(const Place& place) const {
        constexpr int VECTORS = TILE_COLUMNS / 8, AT_ONCE = 32 / VECTORS;
        const int vector = lane % VECTORS, column = place.column + 8 * vector;
        if (column >= 2 * p.width) return;
        Elem* layer = p.pool + place.layer * p.layer_stride;
        layer += column < p.width ? (long long)PAGE * p.width + column : column - p.width;   // of V, of K
        const u32 from = c_tile + (vector / 8) * STRIP_BYTES;
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            if (2 * place.pair + half >= p.count) return;
            Elem* to = layer + place.page(p, half) * p.page_stride;
#pragma unroll 4
            for (int i = 0; i < 16; i += AT_ONCE) {
                const int row = warp * 16 + i + lane / VECTORS;
                const u32 at = from + half * BOX_BYTES + row * ROW_BYTES + (((vector ^ row) & 7) * 16);
                *reinterpret_cast<uint4*>(to + (long long)row * p.width) = load_vector(at);
            }
        }
    }

    __device__ __forceinline__ void run() {
        const Tiles tiles(p);
        const int stages = (p.depth + BOX - 1) / BOX;   // of a tile
        if (group == 1) ring.skip(stages);
        u32 turn = 0;
        for (int tile = blockIdx.x + group * gridDim.x; tile < tiles.count; tile += 2 * gridDim.x, ++turn) {
            // All that can be had before the products is had before them: this warpgroup waits for its turn.
            const Place place = tiles.place(p, tile);
            u32 bias[TILE_COLUMNS / 8];
            load_bias(bias, p.bias + place.layer * 2 * p.width, place.column, 2 * p.width);
            float half_scale[HALVES][2];
            load_scales(half_scale, place);
            float sum[HALVES][SUMS];
            multiply(sum, p.depth, (turn + 1 + group) & 1);   // the first one's first turn waits for nobody
            silu_to_tile(sum, bias, half_scale, [](int, float low, float high) { return pack(low, high); });
            __syncwarp();   // a warp reads what it wrote, and nobody else's
            write_pages(place);
            __syncwarp();
            ring.skip(stages);   // the other consumer's
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    rebuild(const __grid_constant__ TensorMap b, const __grid_constant__ Params p) {
    extern __shared__ unsigned char raw[];
    const u32 smem = (shared_address(raw) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        let_next_start();
        for (int i = 0; i < STAGES; ++i)
            barrier_init(smem + FULL + 8 * i, 1 + WARPS), barrier_init(smem + EMPTY + 8 * i, WARPS);
        for (int i = 0; i < 2; ++i) barrier_init(smem + TURN + 8 * i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&b) : "memory");
    }
    __syncthreads();
    await_kernels_before();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        Producer producer(&b, p, smem);
        producer.run();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
        Consumer consumer(p, smem);
        consumer.run();
    }
}
