// What the kernels of a matrix product share: a ring of stages, and the two warpgroups of a thread block that take
// alternate tiles from it. Included after hopper.cuh.
//
//   TILE_ROWS     64 | 128: of a tile of C. Small ones for few rows, where large ones would leave
//   TILE_COLUMNS  64 | 128  multiprocessors idle.

#ifndef TILE_ROWS
#define TILE_ROWS 128
#endif
#ifndef TILE_COLUMNS
#define TILE_COLUMNS 128
#endif

// ---- geometry -------------------------------------------------------------------------------
constexpr int BOX = 64;                           // rows and columns of a copy; k of a stage; rows of one wgmma
constexpr int ROW_BYTES = BOX * 2;                // the most that a swizzled row can have
constexpr int BOX_BYTES = BOX * ROW_BYTES;        // a multiple of 1024, the swizzle's alignment
constexpr int HALVES = TILE_ROWS / BOX;           // row boxes of a tile
constexpr int STRIPS = TILE_COLUMNS / BOX;        // column boxes of a tile
constexpr int SUMS = TILE_COLUMNS / 2;            // fp32 sums of a thread in each half
constexpr int A_BYTES = HALVES * BOX_BYTES;
constexpr int STAGE_BYTES = A_BYTES + STRIPS * BOX_BYTES;
constexpr int STRIP_BYTES = TILE_ROWS * ROW_BYTES;   // 64 columns of C: its boxes lie one below the other
constexpr int C_BYTES = STRIPS * STRIP_BYTES;
constexpr int WARPS = 4;                          // of a warpgroup
constexpr int THREADS = 384;

// Each consumer has a tile of C of its own; the stages take the rest of the 227 KiB.
constexpr int SHARED_LIMIT = 232448, RESERVED = 2048;   // alignment of the start, barriers
constexpr int STAGES = (SHARED_LIMIT - RESERVED - 2 * C_BYTES) / STAGE_BYTES;

constexpr int C_AT = STAGES * STAGE_BYTES;
constexpr int FULL = C_AT + 2 * C_BYTES;          // barriers: a stage has arrived,
constexpr int EMPTY = FULL + 8 * STAGES;          // a stage has been used,
constexpr int TURN = EMPTY + 8 * STAGES;          // [2]: a consumer may begin its products;
constexpr int OTHERS = TURN + 16;                 // a kernel's own

static_assert(TILE_ROWS == 64 || TILE_ROWS == 128, "TILE_ROWS");
static_assert(TILE_COLUMNS == 64 || TILE_COLUMNS == 128, "TILE_COLUMNS");

// ---- PTX ------------------------------------------------------------------------------------
// Ties register values to this point of the program, so that no use of them moves across it.
template <int N>
__device__ __forceinline__ void hold(float (&x)[HALVES][N]) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[half][i])::"memory");
}
// Four 8 x 8 matrices; lanes 8 i .. 8 i + 7 name the rows of the i-th, of which each lane has two elements.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_matrices(u32 to, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ uint4 load_vector(u32 from) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}

// Shared-memory matrix descriptor: bits 0-13 address / 16, 16-29 LBO / 16, 32-45 SBO / 16, 62-63 swizzle
// (1: 128 bytes).
//   K-major (A: the product's k runs along a row): the next 8 rows lie SBO away; a k-step is 32 bytes
//       inside the row (the swizzle XORs address bits 4-6 with bits 7-9, which the advance leaves alone);
//       LBO is not used.
//   MN-major (B: the product's n runs along a row, its k down the rows): the next 64 columns lie LBO away,
//       in the next box; the next 8 k lie SBO away. A k-step is 16 rows.
constexpr u64 SWIZZLE = (u64)1 << 62;
constexpr u64 K_MAJOR = SWIZZLE | ((u64)(8 * ROW_BYTES / 16) << 32) | ((u64)1 << 16);
constexpr u64 MN_MAJOR = SWIZZLE | ((u64)(8 * ROW_BYTES / 16) << 32) | ((u64)(BOX_BYTES / 16) << 16);
__device__ __forceinline__ u64 k_major(u32 address) { return K_MAJOR | (u64)(address >> 4); }
__device__ __forceinline__ u64 mn_major(u32 address) { return MN_MAJOR | (u64)(address >> 4); }

// Constraints of the sums, 16 at a time.
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)
#define WGMMA(n, names, a, b, add) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." ELEM_NAME "." ELEM_NAME " {" names "}, " a ", " b \
    ", p, 1, 1, 0, 1;\n}\n"

// d = A B, or d += A B: [64, TILE_COLUMNS] by a k-step of 16; B transposed by the product.
__device__ __forceinline__ void product_step(float (&d)[SUMS], u64 a, u64 b, int add) {
#if TILE_COLUMNS == 64
    asm volatile(WGMMA("64", NAMES_0 ", " NAMES_16, "%32", "%33", "%34")
                 : SIXTEEN(d, 0), SIXTEEN(d, 16) : "l"(a), "l"(b), "r"(add));
#else
    asm volatile(WGMMA("128", NAMES_0 ", " NAMES_16 ", " NAMES_32 ", " NAMES_48, "%64", "%65", "%66")
                 : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48) : "l"(a), "l"(b), "r"(add));
#endif
}

// Position in the ring of stages; phase flips at each wrap.
struct Ring {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    __device__ __forceinline__ void skip(int stages) {
        stage += stages;
        const u32 wraps = stage / STAGES;
        stage -= wraps * STAGES;
        phase ^= wraps & 1;
    }
};

// One thread's part of a stage: says that `bytes` will come by bulk copies, and brings B's.
__device__ __forceinline__ void load_b(u32 smem, const TensorMap* map, u32 stage, u32 bytes, int column, int k) {
    const u32 at = smem + stage * STAGE_BYTES + A_BYTES, full = smem + FULL + 8 * stage;
    barrier_expect(full, bytes);
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip) load_box(at + strip * BOX_BYTES, map, full, column + strip * BOX, k);
}

// ---- what multiplies ------------------------------------------------------------------------
struct Multiplier {
    u32 smem;
    u32 c_tile;               // this warpgroup's
    int group, warp, lane;    // warpgroup of the block, warp of the warpgroup
    Ring ring;

    __device__ __forceinline__ explicit Multiplier(u32 smem) : smem(smem) {
        lane = threadIdx.x & 31;
        warp = uniform((threadIdx.x >> 5) & 3);
        group = uniform((threadIdx.x >> 7) - 1);
        c_tile = smem + C_AT + group * C_BYTES;
    }

    __device__ __forceinline__ void release(u32 stage) const {
        __syncwarp();
        if (lane == 0) barrier_arrive(smem + EMPTY + 8 * stage);
    }

    // sum = A B of one tile, over `depth`. One stage's products are always queued behind those that run.
    __device__ __forceinline__ void multiply(float (&sum)[HALVES][SUMS], int depth, u32 turn_parity) {
        // Stages lie in the order of the tiles: until the other consumer has seen all of its own arrive,
        // the parity of a barrier could mean its tile as well as this one.
        barrier_wait(smem + TURN + 8 * group, turn_parity);
        u32 last = 0;
        for (int k = 0; k < depth; k += BOX) {
            const u32 a = smem + ring.stage * STAGE_BYTES, b = a + A_BYTES;
            barrier_wait(smem + FULL + 8 * ring.stage, ring.phase);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < BOX / 16; ++step)
#pragma unroll
                for (int half = 0; half < HALVES; ++half)
                    product_step(sum[half], k_major(a + half * BOX_BYTES + step * 32),
                                 mn_major(b + step * 16 * ROW_BYTES), step || k);
            wgmma_commit();
            wgmma_wait<1>();
            if (k) release(last);
            last = ring.stage;
            ring.advance();
        }
        if (lane == 0) barrier_arrive(smem + TURN + 8 * (group ^ 1));
        wgmma_wait<0>();
        release(last);
        hold(sum);   // after the release, so that the epilogue does not delay it
    }

    // The tile of C in shared memory: STRIPS of 64 columns, rows of 128 bytes, whose 16-byte chunks are
    // swizzled by the row. The lane's row in the four matrices of a load or store, rows (0-7, 8-15) by
    // columns (0-7, 8-15), in the order in which wgmma gives a warp's sums.
    __device__ __forceinline__ u32 matrices_at() const {
        return c_tile + (warp * 16 + (lane & 15)) * ROW_BYTES;
    }
    __device__ __forceinline__ u32 in_strip(int half, int g) const {
        const u32 chunk = (g & 7) ^ (lane >> 4) ^ (lane & 7);
        return (g / 8) * STRIP_BYTES + half * BOX_BYTES + chunk * 16;
    }

    // The bias of the thread's columns: pairs 8 g + 2 (lane % 4); zero from `columns` on.
    __device__ __forceinline__ void load_bias(u32 (&bias)[TILE_COLUMNS / 8], const Elem* all, int column,
                                              int columns) const {
        const int mine = column + 2 * (lane & 3);
#pragma unroll
        for (int g = 0; g < TILE_COLUMNS / 8; ++g)
            bias[g] = mine + 8 * g < columns ? __ldg(reinterpret_cast<const u32*>(all + mine + 8 * g)) : 0;
    }
    // The tile of C = finish(g, SiLU(scale * sum + bias)), pairs of columns 8 g and on packed by `finish`. `half_scale` is
    // half the scale of each of the thread's rows, which are lane / 4 of the warp's 16 and 8 further, in each half.
    template <class Finish>
    __device__ __forceinline__ void silu_to_tile(const float (&sum)[HALVES][SUMS], const u32 (&bias)[TILE_COLUMNS / 8],
                                                 const float (&half_scale)[HALVES][2], Finish finish) const {
        const u32 at = matrices_at();
#pragma unroll
        for (int g = 0; g < TILE_COLUMNS / 8; g += 2) {
            float2 half_bias[2] = {unpack(bias[g]), unpack(bias[g + 1])};
#pragma unroll
            for (int i = 0; i < 2; ++i) half_bias[i].x *= 0.5f, half_bias[i].y *= 0.5f;
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* s = sum[half] + 4 * g + 2 * i;
                    const float2 b = half_bias[i / 2];
                    const float h = half_scale[half][i & 1];
                    x[i] = finish(g + i / 2, silu_of_half(fmaf(s[0], h, b.x)), silu_of_half(fmaf(s[1], h, b.y)));
                }
                store_matrices(at + in_strip(half, g), x);
            }
        }
    }
};
