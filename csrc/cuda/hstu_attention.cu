// Paged HSTU attention, forward, for Hopper (sm_90a).
//
//   y_i = sum over visible j of SiLU(alpha q_i . k_j) / n * v_j,   alpha = 1 / sqrt(HEAD_DIM)
//
// There is no softmax, so the keys of a row may be cut anywhere and the partial sums simply add.
//
// A persistent grid takes units of work, (item of the work list, head), from an atomic counter. An
// item is a tile of at most 64 * WARPGROUPS query rows of one user slot times a run of its key
// blocks. A key block is 64 tokens: one page of the cached prefix, or 64 of the slot's new rows.
//
//   keys of a slot, in blocks      from
//   [0, ceil(cached / 64))         the pool, through the page table; the last one may be part filled
//   from there, delta new rows     the projection's output (k and v sections of uvqk)
//   a candidate itself             the projection's output, for itself alone (see `own_sums`)
//
// One producer warp loads Q, K and V tiles by bulk tensor copies into rings of shared memory; each
// consumer warpgroup owns 64 rows: S = Q K^T (wgmma, fp32 in registers), SiLU and mask in registers,
// whose fragments are at once the A operand of O += S V. S of the next block is computed together
// with O of this one, and SiLU of the next runs beside the rest of O.
//
// Pages of fp8 take another way into the rings: the producer loads their bytes, in tiles of half the size, and three warps
// of its warpgroup, idle otherwise, write the numbers as Elems where a bulk copy would have put them:
//
//   pages, e4m3   -> bulk copy -> staging -> converters -> K and V stages -> consumers
//   new rows, ours -> bulk copy ---------------------------^
//
// Builds with `nvcc -gencode=arch=compute_90a,code=sm_90a --cubin` and with NVRTC: no headers.
//   HEAD_DIM    32 | 64 | 128 | 256
//   FP16        0 bf16, 1 fp16
//   WARPGROUPS  2: tiles of 128 rows, any head dim. 3: tiles of 192 rows, head dim <= 128; a K/V tile
//               then serves more rows, which pays where there are rows enough (measured: +20% on long
//               prefixes), and costs where there are few.
//   CHUNKED     0. With 1 a row's sum is made of chunks of blocks that the work list fixes for its slot: the first half
//               of them added in order, the second likewise, then the two, partly within a unit and partly by whoever
//               adds up partial sums. It has the same bits however units are cut.
//   FP8_PAGES   0. 1: the pool's numbers are e4m3.
//   SPIN_LIMIT  0. For debugging: polls after which a barrier gives up, so that a hang becomes a wrong result.

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef CHUNKED
#define CHUNKED 0
#endif

#ifndef FP8_PAGES
#define FP8_PAGES 0
#endif

#include "hopper.cuh"
#include "fp8.cuh"

// ---- geometry -------------------------------------------------------------------------------
constexpr int D = HEAD_DIM;
constexpr int BLOCK = 64;                      // tokens of a page and of a K or V stage, rows of a warpgroup
constexpr int COLS = D < 64 ? D : 64;          // columns of one tensor-copy box: a swizzled row has at most 128 bytes
constexpr int ROW_BYTES = COLS * 2;            // 128 (swizzle 128B) or 64 (swizzle 64B)
constexpr int BOXES = D / COLS;
constexpr int BOX_BYTES = BLOCK * ROW_BYTES;   // 8192 or 4096: multiples of 1024, the swizzle's alignment
constexpr int TILE_BYTES = BOXES * BOX_BYTES;  // 64 rows x D
constexpr int STEPS = D / 16;                  // k-steps of 16 in Q K^T
constexpr int STEPS_PER_BOX = ROW_BYTES / 32;  // 16 elements are 32 bytes
constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);

// k-steps whose Q fragments stay in registers; the others read Q from shared memory. A consumer of two
// has 232 registers: O takes D / 2 of them, S 32, its packed weights 16, all of Q another D / 4. With
// D = 256 (O: 128), and with three consumers of 160 registers, Q does not fit; two steps do for D <= 128.
constexpr int Q_STEPS = WARPGROUPS == 3 ? 2 : D <= 128 ? STEPS : 0;
// A sum of closed chunks waits in shared memory: D / 2 floats a thread. With D = 256 there is no room, and it waits in
// the output, where L2 adds to it; that is slow (2.7 microseconds a chunk were measured, under one through shared memory).
constexpr bool KEPT_SUMS = CHUNKED && D <= 128;
// Stages: as many as fit 227 KiB beside Q (and kept sums or the merge buffer). V is held a block longer than K. What fp8
// pages are staged in, two to a K or V stage, has their place.
constexpr int K_STAGES = D < 128 ? 5 : FP8_PAGES ? (D > 128 ? 2 : !KEPT_SUMS ? 4 : WARPGROUPS == 2 ? 3 : 2)
                                                 : D > 128 ? 2 : !KEPT_SUMS ? 5 : WARPGROUPS == 2 ? 4 : 2;
constexpr int V_STAGES = D < 128 || !FP8_PAGES ? (D > 128 ? 3 : !KEPT_SUMS || D < 128 ? 5 : WARPGROUPS == 2 ? 4 : 3)
                                               : K_STAGES;
constexpr int STAGING = !FP8_PAGES ? 0 : K_STAGES > 2 ? 4 : 2;
constexpr int CONVERTERS = 3;                  // warps
constexpr int FILLERS = FP8_PAGES ? CONVERTERS : 1;  // arrivals that make a K or V stage full
constexpr int STAGED_COLS = D < 128 ? D : 128; // bytes of a row of a staged box, swizzled over as many
constexpr int STAGED_BOXES = D / STAGED_COLS;
constexpr int STAGED_BOX_BYTES = BLOCK * STAGED_COLS;
constexpr int STAGED_BYTES = BLOCK * D;
// Tiles of <= 64 rows would leave the second warpgroup idle: the two take alternate key blocks of the
// same rows instead, and add up through shared memory. With D = 256 there is no room for that.
constexpr bool ALTERNATE = WARPGROUPS == 2 && D <= 128 && !CHUNKED;

constexpr int Q_AT = 0;
constexpr int K_AT = Q_AT + WARPGROUPS * TILE_BYTES;
constexpr int V_AT = K_AT + K_STAGES * TILE_BYTES;
constexpr int MERGE_AT = V_AT + V_STAGES * TILE_BYTES;
constexpr int STAGING_AT = MERGE_AT + (ALTERNATE ? 1 : KEPT_SUMS ? WARPGROUPS : 0) * BLOCK * D * 4;
constexpr int UNIT_AT = STAGING_AT + STAGING * STAGED_BYTES;
constexpr int ERRANDS_AT = UNIT_AT + 64;       // 16 ints describe the unit
constexpr int BARRIERS_AT = ERRANDS_AT + 16 * STAGING;
constexpr int UNIT_FULL = BARRIERS_AT;
constexpr int Q_FULL = UNIT_FULL + 8;
constexpr int Q_EMPTY = Q_FULL + 8;            // Q and the unit's description are free again
constexpr int K_FULL = Q_EMPTY + 8;
constexpr int K_EMPTY = K_FULL + 8 * K_STAGES;
constexpr int V_FULL = K_EMPTY + 8 * K_STAGES;
constexpr int V_EMPTY = V_FULL + 8 * V_STAGES;
constexpr int STAGED_FULL = V_EMPTY + 8 * V_STAGES;
constexpr int STAGED_EMPTY = STAGED_FULL + 8 * STAGING;
constexpr int SHARED_END = STAGED_EMPTY + 8 * STAGING;
// Dynamic shared memory to ask for: 1024 more, to align the start.
extern "C" __device__ const int hstu_shared_bytes = SHARED_END + 1024;

static_assert(D == 32 || D == 64 || D == 128 || D == 256, "HEAD_DIM");
static_assert(WARPGROUPS == 2 || (WARPGROUPS == 3 && D <= 128), "WARPGROUPS");
static_assert(SHARED_END + 1024 <= 232448, "a block of sm_90 has at most 227 KiB");
// The producer does not await the stages that converters fill. It must not come by a stage again before what was in it
// the time before last has gone, or the parity of its barrier would mean that.
static_assert(STAGING < 2 * (K_STAGES < V_STAGES ? K_STAGES : V_STAGES) - 1, "the producer runs too far ahead");
static_assert(!ALTERNATE || (K_STAGES >= 4 && V_STAGES >= 4), "a V stage is held while the K two blocks on is awaited");

// Registers after setmaxnreg. The launch gives 65536 / THREADS, rounded down to 8, to each thread: 168
// with 384 threads, 128 with 512. (40 + 2 * 232) * 128 = 168 * 384; (32 + 3 * 160) * 128 = 128 * 512. Converters take more:
// (56 + 2 * 224) * 128 and (56 + 3 * 152) * 128 are as many.
constexpr int PRODUCER_REGS = FP8_PAGES ? 56 : WARPGROUPS == 2 ? 40 : 32;
constexpr int CONSUMER_REGS = (WARPGROUPS == 2 ? 232 : 160) - (FP8_PAGES ? 8 : 0);

// Mirrored by `Params` in mtserve/kernels/attention/cuda.py.
struct Params {
    const Elem* uvqk;     // [T, 4, H, D]: u, v, q, k; u is never read
    const int4* work;     // [capacity][2]: slot, row, rows, begin | end, split, chunk, half
    const int* count;     // [1]: items of the work list
    const int4* slots;    // [B]: cached, delta, first_row, rows
    const int* table;     // [B, table_width]: page ids
    const int* limit;     // [T]
    void* out;            // partial: float [splits, T, H * D]; else Elem [T, H * D]
    int* counter;         // [2], zero before the first launch; every launch leaves it zero
    long long split_stride;
    int capacity;
    int heads;
    int table_width;
    int page_rows;        // rows of the pool's 2D view from page to page
    int layer_row;        // of that view: the layer's first K row within a page; V follows 64 rows on
    int partial;
    float half_alpha;
    float inv_n;
};

// ---- PTX ------------------------------------------------------------------------------------
__device__ __forceinline__ void load_tile(u32 to, const TensorMap* map, u32 bar, int x, int y) {
#pragma unroll
    for (int c = 0; c < BOXES; ++c) load_box(to + c * BOX_BYTES, map, bar, x + c * COLS, y);
}
// Ties register values to this point of the program, so that no use of them moves above a wait.
template <int N>
__device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
// Shared-memory matrix descriptor: bits 0-13 address / 16, 16-29 LBO / 16, 32-45 SBO / 16,
// 62-63 swizzle (1: 128 bytes, 2: 64 bytes). In units of 16 bytes, with R = ROW_BYTES / 16:
//   K-major  (Q, K: the product's k runs along a row):
//       rows (8, m) at strides (R, SBO): 8 rows of one swizzle atom, the next 8 rows SBO away
//       -> SBO = 8 * ROW_BYTES. A k-step is 32 bytes inside the row: advance the address by 32
//       (the swizzle XORs address bits 4-6 with bits 7-9, which the advance leaves alone);
//       LBO is not used by swizzled K-major layouts (1 by convention).
//   MN-major (V: the product's n runs along a row, its k = tokens down the rows):
//       n (R, boxes) at strides (1, LBO): the 64 columns of a row, the next 64 columns LBO away
//       -> LBO = BOX_BYTES, since boxes of 64 columns lie one after the other;
//       k (8, 2) at strides (R, SBO): 8 tokens of an atom, the next 8 of this k-step SBO away
//       -> SBO = 8 * ROW_BYTES. A k-step is 16 tokens: advance by 16 * ROW_BYTES = two atoms.
constexpr u64 SWIZZLE = (u64)(ROW_BYTES == 128 ? 1 : 2) << 62;
constexpr u64 K_MAJOR = SWIZZLE | ((u64)(8 * ROW_BYTES / 16) << 32) | ((u64)1 << 16);
constexpr u64 MN_MAJOR = SWIZZLE | ((u64)(8 * ROW_BYTES / 16) << 32) | ((u64)(BOX_BYTES / 16) << 16);
__device__ __forceinline__ u64 k_major(u32 address) { return K_MAJOR | (u64)(address >> 4); }
__device__ __forceinline__ u64 mn_major(u32 address) { return MN_MAJOR | (u64)(address >> 4); }
__host__ __device__ constexpr int step_offset(int step) {
    return (step / STEPS_PER_BOX) * BOX_BYTES + (step % STEPS_PER_BOX) * 32;
}

// Operand names and constraints of the accumulators.
#define NAMES_TO_16 NAMES_0
#define NAMES_TO_32 NAMES_0 ", " NAMES_16
#define NAMES_TO_64 NAMES_TO_32 ", " NAMES_32 ", " NAMES_48
#define NAMES_TO_128 NAMES_TO_64 ", " NAMES_64 ", " NAMES_80 ", " NAMES_96 ", " NAMES_112
#define FOUR(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SIXTEEN(c, d, i) FOUR(c, d, i), FOUR(c, d, i + 4), FOUR(c, d, i + 8), FOUR(c, d, i + 12)
#define ALL_16(c, d) SIXTEEN(c, d, 0)
#define ALL_32(c, d) SIXTEEN(c, d, 0), SIXTEEN(c, d, 16)
#define ALL_64(c, d) ALL_32(c, d), SIXTEEN(c, d, 32), SIXTEEN(c, d, 48)
#define ALL_128(c, d) ALL_64(c, d), SIXTEEN(c, d, 64), SIXTEEN(c, d, 80), SIXTEEN(c, d, 96), SIXTEEN(c, d, 112)
#define WGMMA(n, add, names, a, b, transposes) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." ELEM_NAME "." ELEM_NAME " {" names "}, " a ", " b ", p, 1, 1, " \
    transposes ";\n}\n"
#define A_REGISTERS(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// S (+)= A B^T: [64, 64] by a k-step of 16; A from registers (rs) or shared memory (ss). The first step
// only writes its accumulator: were it an input too, its last use as SiLU's scratch would count as an
// input of this product, and ptxas would serialise the pipeline.
template <bool FIRST>
__device__ __forceinline__ void score_step_ss(float (&d)[32], u64 a, u64 b) {
    if constexpr (FIRST)
        asm volatile(WGMMA("64", "0", NAMES_TO_32, "%32", "%33", "0, 0") : ALL_32("=f", d) : "l"(a), "l"(b));
    else
        asm volatile(WGMMA("64", "1", NAMES_TO_32, "%32", "%33", "0, 0") : ALL_32("+f", d) : "l"(a), "l"(b));
}
template <bool FIRST>
__device__ __forceinline__ void score_step_rs(float (&d)[32], const u32* a, u64 b) {
    if constexpr (FIRST)
        asm volatile(WGMMA("64", "0", NAMES_TO_32, "{%32, %33, %34, %35}", "%36", "0")
                     : ALL_32("=f", d) : A_REGISTERS(a), "l"(b));
    else
        asm volatile(WGMMA("64", "1", NAMES_TO_32, "{%32, %33, %34, %35}", "%36", "0")
                     : ALL_32("+f", d) : A_REGISTERS(a), "l"(b));
}
// O += P V, or O = P V without `add`: [64, D] by a k-step of 16 tokens; P from registers, V transposed by the product.
__device__ __forceinline__ void value_step(float (&d)[D / 2], const u32* a, u64 b, u32 add) {
#if HEAD_DIM == 32
    asm volatile(WGMMA("32", "%21", NAMES_TO_16, "{%16, %17, %18, %19}", "%20", "1")
                 : ALL_16("+f", d) : A_REGISTERS(a), "l"(b), "r"(add));
#elif HEAD_DIM == 64
    asm volatile(WGMMA("64", "%37", NAMES_TO_32, "{%32, %33, %34, %35}", "%36", "1")
                 : ALL_32("+f", d) : A_REGISTERS(a), "l"(b), "r"(add));
#elif HEAD_DIM == 128
    asm volatile(WGMMA("128", "%69", NAMES_TO_64, "{%64, %65, %66, %67}", "%68", "1")
                 : ALL_64("+f", d) : A_REGISTERS(a), "l"(b), "r"(add));
#else
    asm volatile(WGMMA("256", "%133", NAMES_TO_128, "{%128, %129, %130, %131}", "%132", "1")
                 : ALL_128("+f", d) : A_REGISTERS(a), "l"(b), "r"(add));
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------
__device__ __forceinline__ void silu_of_scores(float (&s)[32], float half_alpha) {
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = silu_of_half(s[i] * half_alpha);
}
// The accumulator fragment of S is the A fragment of the next product: p[4 k + i] of k-step k.
__device__ __forceinline__ void to_fragments(const float (&s)[32], u32 (&p)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}
// Element 4 g + 2 r + c of a fragment: row lane / 4 + 8 r of the warp's 16, column 8 g + 2 (lane % 4) + c.
// SiLU(0) is exactly 0, and a select drops a NaN.
__device__ __forceinline__ void mask_columns(float (&s)[32], int seen0, int seen1, int lane) {
    const int column = 2 * (lane & 3);
#pragma unroll
    for (int g = 0; g < 8; ++g) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            s[4 * g + c] = 8 * g + c + column < seen0 ? s[4 * g + c] : 0.0f;
            s[4 * g + 2 + c] = 8 * g + c + column < seen1 ? s[4 * g + 2 + c] : 0.0f;
        }
    }
}

// Position in a ring of N stages; phase flips at each wrap.
template <int N>
struct Ring {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == N) stage = 0, phase ^= 1;
    }
};

// What the producer tells the consumers of a unit, in shared memory.
struct Unit {
    int head;             // -1: there are no more
    int row, rows;        // of the tile
    int begin, blocks;    // the run of key blocks
    int split;
    int chunk;            // CHUNKED: blocks of a chunk
    int half;             // CHUNKED: where the chunks of the second half begin, in a unit that has some of both; else 0
    int cached, delta, first_row;   // of the slot
};
static_assert(sizeof(Unit) <= 64, "UNIT_AT has 64 bytes");

// What the producer tells the converters of staged bytes, in shared memory: where they go, what to tell when they are
// there, and what to await before.
struct alignas(16) Errand {
    u32 tile;             // 0: there are no more
    u32 full, empty;      // barriers of the stage
    u32 parity;           // of the latter
};

// ---- producer: one warp ---------------------------------------------------------------------
struct Producer {
    const TensorMap* pool;
    const TensorMap* rows_map;
    const Params& p;
    u32 smem;
    Unit* unit_slot;
    Errand* errands;
    int lane;
    u32 q_phase = 0;
    Ring<K_STAGES> k;
    Ring<V_STAGES> v;
    Ring<STAGING> staged;

    // Bytes of a page, and what is to become of them.
    __device__ __forceinline__ void stage(const Errand& errand, int x, int row) {
        if (lane == 0) {
            const u32 full = smem + STAGED_FULL + 8 * staged.stage;
            barrier_wait(smem + STAGED_EMPTY + 8 * staged.stage, staged.phase ^ 1);
            errands[staged.stage] = errand;
            barrier_expect(full, STAGED_BYTES);
#pragma unroll
            for (int c = 0; c < STAGED_BOXES; ++c)
                load_box(smem + STAGING_AT + staged.stage * STAGED_BYTES + c * STAGED_BOX_BYTES, pool, full,
                         x + c * STAGED_COLS, row);
        }
        staged.advance();
    }
    // A stage that a bulk copy fills is full for as many arrivals as one that the converters fill.
    __device__ __forceinline__ void expect_tile(u32 full) {
        barrier_expect(full, TILE_BYTES);
#pragma unroll
        for (int i = 1; i < FILLERS; ++i) barrier_arrive(full);
    }

    __device__ __forceinline__ void put_k(bool cached, int x, int row) {
        if (FP8_PAGES && cached) {
            stage({smem + K_AT + k.stage * TILE_BYTES, smem + K_FULL + 8 * k.stage, smem + K_EMPTY + 8 * k.stage,
                   k.phase ^ 1}, x, row);
        } else if (lane == 0) {
            barrier_wait(smem + K_EMPTY + 8 * k.stage, k.phase ^ 1);
            const u32 full = smem + K_FULL + 8 * k.stage;
            expect_tile(full);
            load_tile(smem + K_AT + k.stage * TILE_BYTES, cached ? pool : rows_map, full,
                      (cached ? 0 : 3 * p.heads * D) + x, row);
        }
        k.advance();
    }
    __device__ __forceinline__ void put_v(bool cached, int x, int row) {
        if (FP8_PAGES && cached) {
            stage({smem + V_AT + v.stage * TILE_BYTES, smem + V_FULL + 8 * v.stage, smem + V_EMPTY + 8 * v.stage,
                   v.phase ^ 1}, x, row);
        } else if (lane == 0) {
            barrier_wait(smem + V_EMPTY + 8 * v.stage, v.phase ^ 1);
            const u32 full = smem + V_FULL + 8 * v.stage;
            expect_tile(full);
            load_tile(smem + V_AT + v.stage * TILE_BYTES, cached ? pool : rows_map, full,
                      (cached ? 0 : p.heads * D) + x, row);
        }
        v.advance();
    }
    // The description goes out before Q, so that consumers fetch limits and own sums while Q is on its way.
    __device__ __forceinline__ void put_unit(const Unit& unit, int x) {
        if (lane == 0) {
            barrier_wait(smem + Q_EMPTY, q_phase ^ 1);
            *unit_slot = unit;
            barrier_arrive(smem + UNIT_FULL);
            const int groups = (unit.rows + BLOCK - 1) / BLOCK;
            barrier_expect(smem + Q_FULL, groups * TILE_BYTES);
            for (int g = 0; g < groups; ++g)
                load_tile(smem + Q_AT + g * TILE_BYTES, rows_map, smem + Q_FULL, 2 * p.heads * D + x,
                          unit.row + BLOCK * g);
        }
        q_phase ^= 1;
    }

    __device__ __forceinline__ void run_unit(int4 w0, int4 w1, int head) {
        const int4 slot = __ldg(p.slots + w0.x);
        const int* table = p.table + (long long)w0.x * p.table_width;
        const Unit unit{head, w0.y, w0.z, w0.w, w1.x - w0.w, w1.y, CHUNKED ? w1.z : 0, CHUNKED ? w1.w : 0,
                        slot.x, slot.y, slot.z};
        const int pages = (slot.x + BLOCK - 1) / BLOCK, x = head * D;
        int ids = 0;          // lane l holds the page id of block begin + 32 g + l
        int v_row = 0;        // V comes one block behind K
        bool v_cached = false;
        // i == blocks is the turn after the last K: only the last V is left.
        for (int i = 0; i <= unit.blocks; ++i) {
            const int last_row = v_row;
            const bool last_cached = v_cached;
            if (i < unit.blocks) {
                const int b = unit.begin + i;
                // Bounded by the table alone: the read need not wait for the slot.
                if ((i & 31) == 0) ids = b + lane < p.table_width ? __ldg(table + b + lane) : 0;
                const int page = __shfl_sync(~0u, ids, i & 31);
                v_cached = b < pages;
                const int row = v_cached ? page * p.page_rows + p.layer_row : slot.z + (b - pages) * BLOCK;
                put_k(v_cached, x, row);
                v_row = v_cached ? row + BLOCK : row;
            }
            // After the first K, which need not wait until the consumers have done with the Q before.
            if (i == 0) put_unit(unit, x);
            else put_v(last_cached, x, last_row);
            __syncwarp();
        }
    }

    __device__ __forceinline__ void run() {
        int unit = blockIdx.x;
        // The first item is fetched beside the count; what lies past the count is not looked at.
        int item = min(unit / p.heads, p.capacity - 1);
        int4 w0 = __ldg(p.work + 2 * item), w1 = __ldg(p.work + 2 * item + 1);
        const int units = __ldg(p.count) * p.heads;
        // The batch's metadata is older than any kernel that may still run; the counter, the projection and new
        // pages are not. Consumers read what the projection wrote only after a unit has come from here.
        await_kernels_before();
        while (unit < units) {
            int next = 0;
            if (lane == 0) next = gridDim.x + atomicAdd(p.counter, 1);
            run_unit(w0, w1, unit - unit / p.heads * p.heads);
            unit = uniform(next);
            item = min(unit / p.heads, p.capacity - 1);
            w0 = __ldg(p.work + 2 * item), w1 = __ldg(p.work + 2 * item + 1);
        }
        if (lane == 0) {
            if constexpr (FP8_PAGES) {
                barrier_wait(smem + STAGED_EMPTY + 8 * staged.stage, staged.phase ^ 1);
                errands[staged.stage].tile = 0;
                barrier_arrive(smem + STAGED_FULL + 8 * staged.stage);
            }
            barrier_wait(smem + Q_EMPTY, q_phase ^ 1);
            unit_slot->head = -1;
            barrier_arrive(smem + UNIT_FULL);
            // The last thread block to see the end of the list leaves the counter as it found it.
            if (atomicAdd(p.counter + 1, 1) == (int)gridDim.x - 1) {
                p.counter[0] = 0;
                p.counter[1] = 0;
            }
        }
    }
};

// ---- converters: three warps ----------------------------------------------------------------
#if FP8_PAGES
struct Converter {
    u32 smem;
    const Errand* errands;
    int warp, lane;

    // Where a row of a swizzled box has its 16-byte `chunk`; `row` modulo 8.
    template <int BYTES>
    static __device__ __forceinline__ u32 swizzled(u32 chunk, u32 row) {
        return chunk ^ (BYTES == 128 ? row : BYTES == 64 ? row >> 1 & 3 : row >> 2 & 1);
    }
    // One tile, 16 numbers a lane and turn, each lane in another row: eight lanes have the same columns of eight rows, one
    // below the other, whose chunks the swizzle lays into other banks, on both sides.
    __device__ __forceinline__ void convert(u32 from, u32 to) const {
        constexpr int CHUNKS = D / 16, IN_STAGED = STAGED_COLS / 16, IN_BOX = COLS / 16;
        constexpr int TURNS = 2 * CHUNKS, AT_ONCE = 3;
        const int r = lane & 7;
#pragma unroll 1
        for (int first = warp; first < TURNS; first += CONVERTERS * AT_ONCE) {
            u32 x[AT_ONCE][4];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const u32 turn = first + CONVERTERS * i, chunk = turn % CHUNKS, row = turn / CHUNKS * 32 + lane;
                if (turn < TURNS)
                    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3])
                                 : "r"(from + chunk / IN_STAGED * STAGED_BOX_BYTES + row * STAGED_COLS +
                                       swizzled<STAGED_COLS>(chunk % IN_STAGED, r) * 16) : "memory");
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const u32 turn = first + CONVERTERS * i, chunk = turn % CHUNKS, row = turn / CHUNKS * 32 + lane;
                const u32 target = to + chunk / IN_BOX * BOX_BYTES + row * ROW_BYTES;
                if (turn < TURNS)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                                     ::"r"(target + swizzled<ROW_BYTES>(2 * (chunk % IN_BOX) + half, r) * 16),
                                     "r"(widen<false>(x[i][2 * half])), "r"(widen<true>(x[i][2 * half])),
                                     "r"(widen<false>(x[i][2 * half + 1])), "r"(widen<true>(x[i][2 * half + 1])) : "memory");
            }
        }
    }
    __device__ __forceinline__ void run() const {
        Ring<STAGING> staged;
        for (;;) {
            barrier_wait(smem + STAGED_FULL + 8 * staged.stage, staged.phase);
            const Errand errand = errands[staged.stage];
            if (errand.tile == 0) return;
            barrier_wait(errand.empty, errand.parity);
            convert(smem + STAGING_AT + staged.stage * STAGED_BYTES, errand.tile);
            fence_async_proxy();
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(errand.full);
                barrier_arrive(smem + STAGED_EMPTY + 8 * staged.stage);
            }
            staged.advance();
        }
    }
};
#endif

// ---- consumers ------------------------------------------------------------------------------
struct Consumer {
    u32 smem;
    int lane, warp, group;           // warp of the warpgroup, warpgroup of the block
    Ring<K_STAGES> k;
    Ring<V_STAGES> v;
    int k_next, v_next;              // block of the unit at which each ring stands
    int begin, pages, cached, delta; // of the unit
    int least_limit;                 // of the warpgroup's rows
    int limit0, limit1;              // of the thread's two rows

    __device__ __forceinline__ u32 k_tile() const { return smem + K_AT + k.stage * TILE_BYTES; }
    __device__ __forceinline__ u32 v_tile(u32 stage) const { return smem + V_AT + stage * TILE_BYTES; }
    __device__ __forceinline__ void k_wait() { barrier_wait(smem + K_FULL + 8 * k.stage, k.phase); }
    __device__ __forceinline__ void v_wait() { barrier_wait(smem + V_FULL + 8 * v.stage, v.phase); }
    __device__ __forceinline__ void k_release() {
        __syncwarp();
        if (lane == 0) barrier_arrive(smem + K_EMPTY + 8 * k.stage);
        k.advance();
        ++k_next;
    }
    // V is taken (awaited) one block before it is let go: the ring stands at the next one to take.
    __device__ __forceinline__ void v_release(u32 stage) {
        __syncwarp();
        if (lane == 0) barrier_arrive(smem + V_EMPTY + 8 * stage);
    }
    __device__ __forceinline__ void v_skip() {
        v_wait();
        v_release(v.stage);
        v.advance();
        ++v_next;
    }
    // A stage that is not used is awaited all the same: an arrival may not run ahead of its phase.
    __device__ __forceinline__ void k_acquire(int i) {
        if constexpr (ALTERNATE)
            while (k_next < i) k_wait(), k_release();
        k_wait();
    }
    // Block i of the unit holds prefix tokens [base, base + valid).
    __device__ __forceinline__ void place(int i, int& base, int& valid) const {
        const int b = begin + i;
        if (b < pages) {
            base = b * BLOCK;
            valid = cached - base;
        } else {
            const int first = (b - pages) * BLOCK;
            base = cached + first;
            valid = delta - first;
        }
    }
    // Rows past the end of the prefix may hold anything: 0 * NaN must not reach the sums. Each warpgroup
    // clears them for itself; that another still reads its own zeros there does no harm.
    __device__ __forceinline__ u32 v_acquire(int i) {
        if constexpr (ALTERNATE)
            while (v_next < i) v_skip();
        v_wait();
        const u32 stage = v.stage, tile = v_tile(stage);
        v.advance();
        ++v_next;
        int base, valid;
        place(i, base, valid);
        if (valid < BLOCK) {
            const int thread = threadIdx.x & 127;
#pragma unroll 1
            for (int c = 0; c < BOXES; ++c)
#pragma unroll 1
                for (int o = valid * ROW_BYTES + thread * 16; o < BOX_BYTES; o += 128 * 16)
                    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + c * BOX_BYTES + o), "r"(0)
                                 : "memory");
            fence_async_proxy();
            named_sync(1 + group, 128);
        }
        return stage;
    }
    __device__ __forceinline__ void mask(float (&s)[32], int i) const {
        int base, valid;
        place(i, base, valid);
        if (base + BLOCK > least_limit || valid < BLOCK)
            mask_columns(s, min(limit0 - base, valid), min(limit1 - base, valid), lane);
    }
    // Fetches the limits of the warpgroup's rows; returns how many of the unit's blocks its rows see.
    // Every warp looks at all 64: the four warps of a warpgroup must agree on its blocks.
    __device__ __forceinline__ int take_limits(const int* limit, int rows, int in_group, int blocks) {
        const int none = 0x7fffffff;
        const int low = lane < rows ? __ldg(limit + lane) : none;
        const int high = lane + 32 < rows ? __ldg(limit + lane + 32) : none;
        least_limit = __reduce_min_sync(~0u, min(low, high));
        const int most = __reduce_max_sync(~0u, max(low == none ? 0 : low, high == none ? 0 : high));
        const int r0 = in_group & 31, r1 = (in_group + 8) & 31;
        const int low0 = __shfl_sync(~0u, low, r0), high0 = __shfl_sync(~0u, high, r0);
        const int low1 = __shfl_sync(~0u, low, r1), high1 = __shfl_sync(~0u, high, r1);
        limit0 = in_group < 32 ? low0 : high0;
        limit1 = in_group + 8 < 32 ? low1 : high1;
        const int seen = most <= cached ? (most + BLOCK - 1) / BLOCK : pages + (most - cached + BLOCK - 1) / BLOCK;
        return max(0, min(blocks, seen - begin));
    }
};

// S = Q K^T over one K tile, [64, 64]
template <int N>
__device__ __forceinline__ void scores(float (&s)[32], const u32 (&q)[N], u32 q_tile, u32 k_tile) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const u64 b = k_major(k_tile) + (step_offset(step) >> 4);
        const u64 a = k_major(q_tile) + (step_offset(step) >> 4);
        const u32* fragment = q + 4 * (step < Q_STEPS ? step : 0);
        if (step < Q_STEPS) {
            if (step == 0) score_step_rs<true>(s, fragment, b);
            else score_step_rs<false>(s, fragment, b);
        } else {
            if (step == 0) score_step_ss<true>(s, a, b);
            else score_step_ss<false>(s, a, b);
        }
    }
    wgmma_commit();
}
// O += P V over one V tile, [64, 64] x [64, D]; a closed sum's successor starts without it.
__device__ __forceinline__ void values(float (&o)[D / 2], const u32 (&p)[16], u32 v_tile, bool closed) {
#pragma unroll
    for (int step = 0; step < BLOCK / 16; ++step)
        value_step(o, p + 4 * step, mn_major(v_tile) + ((step * 16 * ROW_BYTES) >> 4), CHUNKED && step == 0 ? !closed : 1);
    wgmma_commit();
}

// A fragments of the first Q_STEPS k-steps. ldmatrix x4 brings matrices (rows 0-7, k 0-7), (8-15, 0-7),
// (0-7, 8-15), (8-15, 8-15), which are a0 .. a3.
template <int N>
__device__ __forceinline__ void load_q(u32 (&q)[N], u32 q_tile, int warp, int lane) {
    const int row = warp * 16 + (lane & 15), high = lane >> 4;
#pragma unroll
    for (int step = 0; step < Q_STEPS; ++step) {
        const int chunk = (step % STEPS_PER_BOX) * 2 + high;
        const int swizzled = ROW_BYTES == 128 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
        const u32 from = q_tile + (step / STEPS_PER_BOX) * BOX_BYTES + row * ROW_BYTES + swizzled * 16;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q[4 * step]), "=r"(q[4 * step + 1]), "=r"(q[4 * step + 2]), "=r"(q[4 * step + 3])
                     : "r"(from) : "memory");
    }
}

// What each candidate sees of itself, laid into the fresh sums; 0 for other rows.
__device__ __forceinline__ void own_sums(float (&o)[D / 2], const Params& p, long long row, bool own0, bool own1,
                                         int head, int lane) {
    if (!__any_sync(~0u, own0 || own1)) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
        return;
    }
    const int t = lane & 3;
    const long long section = (long long)p.heads * D;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool own = r ? own1 : own0;
        const Elem* at = p.uvqk + (row + 8 * r) * 4 * section + head * D;
        float dot = 0.0f;
        if (own) {
#pragma unroll
            for (int c = 0; c < D / 32; ++c) {
                const uint4 a = __ldg(reinterpret_cast<const uint4*>(at + 2 * section) + 4 * c + t);
                const uint4 b = __ldg(reinterpret_cast<const uint4*>(at + 3 * section) + 4 * c + t);
                const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 fa = unpack(as[i]), fb = unpack(bs[i]);
                    dot = fmaf(fa.x, fb.x, dot);
                    dot = fmaf(fa.y, fb.y, dot);
                }
            }
        }
        dot += __shfl_xor_sync(~0u, dot, 1);
        dot += __shfl_xor_sync(~0u, dot, 2);
        const float weight = silu_of_half(dot * p.half_alpha);
#pragma unroll
        for (int g = 0; g < D / 8; ++g) {
            float2 f = make_float2(0.0f, 0.0f);
            if (own) f = unpack(__ldg(reinterpret_cast<const u32*>(at + section) + 4 * g + t));
            o[4 * g + 2 * r] = weight * f.x;
            o[4 * g + 2 * r + 1] = weight * f.y;
        }
    }
}

// Row r (0, 1) of the thread's two: into split `split`, onto the chunks closed before where there are any. These are
// either `kept`, or (null) stored there already: the addition is then L2's, which nobody waits for, and it is no race,
// as only this thread ever writes there, in order. Products are rounded before they are added, so that adding here
// and adding partial sums later give the same bits.
__device__ __forceinline__ void store_row(const float (&o)[D / 2], const Params& p, int r, long long row, int split,
                                          int head, int lane, const float* kept, bool add) {
    const long long at = row * p.heads * D + head * D + 2 * (lane & 3);
    if (p.partial) {
        float* to = reinterpret_cast<float*>(p.out) + split * p.split_stride + at;
#pragma unroll
        for (int g = 0; g < D / 8; ++g) {
            const int i = 4 * g + 2 * r;
            float2 sum = make_float2(__fmul_rn(o[i], p.inv_n), __fmul_rn(o[i + 1], p.inv_n));
            if (KEPT_SUMS && add)
                sum = make_float2(__fadd_rn(kept[i * 128], sum.x), __fadd_rn(kept[(i + 1) * 128], sum.y));
            if (CHUNKED && !KEPT_SUMS && add)
                asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to + 8 * g), "f"(sum.x), "f"(sum.y) : "memory");
            else
                *reinterpret_cast<float2*>(to + 8 * g) = sum;
        }
    } else {
        Elem* to = reinterpret_cast<Elem*>(p.out) + at;
#pragma unroll
        for (int g = 0; g < D / 8; ++g)
            *reinterpret_cast<u32*>(to + 8 * g) = pack(o[4 * g + 2 * r] * p.inv_n, o[4 * g + 2 * r + 1] * p.inv_n);
    }
}

// Puts a closed chunk's sum to the thread's others.
__device__ __forceinline__ void keep(float* kept, const float (&o)[D / 2], float scale, bool add) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
        const float sum = __fmul_rn(o[i], scale);
        kept[i * 128] = add ? __fadd_rn(kept[i * 128], sum) : sum;
    }
}

// The sums of the second warpgroup go to the first. Both come here.
__device__ __forceinline__ void merge_sums(float (&o)[D / 2], float* merge, int group) {
    const int thread = threadIdx.x & 127;
    if (group == 1) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) merge[i * 128 + thread] = o[i];
    }
    named_sync(1 + WARPGROUPS, 256);
    if (group == 0) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] += merge[i * 128 + thread];
    }
    named_sync(1 + WARPGROUPS, 256);
}

__device__ __forceinline__ void consume(const Params& p, u32 smem, const Unit* unit, float* merge) {
    Consumer c;
    c.smem = smem;
    c.lane = threadIdx.x & 31;
    c.warp = uniform((threadIdx.x >> 5) & 3);
    c.group = uniform((threadIdx.x >> 7) - 1);
    const int lane = c.lane;
    const int in_group = c.warp * 16 + (lane >> 2);   // the thread's first row of the warpgroup's 64; the second: + 8

    for (u32 phase = 0;; phase ^= 1) {
        barrier_wait(smem + UNIT_FULL, phase);
        const int head = uniform(unit->head);
        if (head < 0) return;
        const int rows = uniform(unit->rows), blocks = uniform(unit->blocks);
        int split = uniform(unit->split);
        const int chunk = CHUNKED ? uniform(unit->chunk) : 0, half = CHUNKED ? uniform(unit->half) : 0;
        c.begin = uniform(unit->begin);
        c.cached = uniform(unit->cached);
        c.delta = uniform(unit->delta);
        c.pages = (c.cached + BLOCK - 1) / BLOCK;
        const bool alternate = ALTERNATE && rows <= BLOCK;
        const bool writes = !(alternate && c.group);
        const int part = alternate ? 0 : c.group;     // which 64 rows of the tile
        const int row = uniform(unit->row) + BLOCK * part;
        const int first_candidate = uniform(unit->first_row) + c.delta;
        const int my_rows = max(0, min(BLOCK, rows - BLOCK * part));
        const int mine = c.take_limits(p.limit + row, my_rows, in_group, blocks);

        float o[D / 2];
        {
            const bool starts = split == 0 && writes;
            const bool own0 = starts && in_group < my_rows && row + in_group >= first_candidate;
            const bool own1 = starts && in_group + 8 < my_rows && row + in_group + 8 >= first_candidate;
            own_sums(o, p, (long long)row + in_group, own0, own1, head, lane);
        }

        barrier_wait(smem + Q_FULL, phase);
        const u32 q_tile = smem + Q_AT + part * TILE_BYTES;
        u32 q[Q_STEPS > 0 ? 4 * Q_STEPS : 4];
        load_q(q, q_tile, c.warp, lane);
        const auto release_q = [&] {
            __syncwarp();
            if (lane == 0) barrier_arrive(smem + Q_EMPTY);
        };
        if (Q_STEPS == STEPS) release_q();

        c.k_next = c.v_next = 0;
        float* kept = merge + c.group * BLOCK * D + (threadIdx.x & 127);
        const auto store = [&](bool add) {
            if (in_group < my_rows) store_row(o, p, 0, (long long)row + in_group, split, head, lane, kept, add);
            if (in_group + 8 < my_rows) store_row(o, p, 1, (long long)row + in_group + 8, split, head, lane, kept, add);
        };
        int closes = chunk;  // the block before which a chunk is closed
        int none = chunk;    // its value while no chunk of this half is
        bool closed = false;
        const int first = alternate ? c.group : 0, stride = alternate ? 2 : 1;
        if (first < mine) {
            // Nothing of wgmma is in flight across turns of the loop: ptxas serialises it otherwise (C7515).
            // SiLU is to run beside wgmma, so it must not slide below the wait that follows it: the wait
            // for the next V stands between them, a loop, which ptxas does not move arithmetic across.
            float s[32];
            u32 w[16];
            c.k_acquire(first);
            wgmma_fence();
            scores(s, q, q_tile, c.k_tile());
            wgmma_wait<0>();
            hold(s);
            c.k_release();
            c.mask(s, first);
            silu_of_scores(s, p.half_alpha);
            to_fragments(s, w);
            u32 v = c.v_acquire(first);
            // A turn starts with the weights of the block before in w, and its V there.
            for (int i = first + stride; i < mine; i += stride) {
                c.k_acquire(i);
                wgmma_fence();
                scores(s, q, q_tile, c.k_tile());
                values(o, w, c.v_tile(v), closed);
                wgmma_wait<1>();
                hold(s);
                c.k_release();
                c.mask(s, i);
                silu_of_scores(s, p.half_alpha);
                hold(s);
                const u32 next_v = c.v_acquire(i);
                wgmma_wait<0>();
                hold(o);
                hold(s);
                c.v_release(v);
                v = next_v;
                to_fragments(s, w);
                closed = CHUNKED && i == closes;
                if (closed) {
                    if (i == half) store(closes > none), ++split, none = half + chunk;
                    else if (KEPT_SUMS) keep(kept, o, p.inv_n, closes > none);
                    else store(closes > none);
                    closes += chunk;
                }
            }
            if (Q_STEPS != STEPS) release_q();
            wgmma_fence();
            values(o, w, c.v_tile(v), closed);
            wgmma_wait<0>();
            hold(o);
            c.v_release(v);
        } else if (Q_STEPS != STEPS) {
            release_q();
        }
        // Blocks that only other warpgroups see.
        while (c.v_next < blocks) {
            if (c.k_next < blocks) c.k_wait(), c.k_release();
            if (c.v_next < c.k_next) c.v_skip();
        }

        if constexpr (ALTERNATE)
            if (alternate) merge_sums(o, merge, c.group);
        if (writes) store(CHUNKED && closes > none);
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    hstu_attention(const __grid_constant__ TensorMap pool, const __grid_constant__ TensorMap rows_map,
                   const __grid_constant__ Params p) {
    extern __shared__ unsigned char raw[];
    const u32 at = shared_address(raw), smem = (at + 1023) & ~1023u;
    unsigned char* aligned = raw + (smem - at);
    Unit* unit = reinterpret_cast<Unit*>(aligned + UNIT_AT);
    if (threadIdx.x == 0) {
        let_next_start();
        barrier_init(smem + UNIT_FULL, 1);
        barrier_init(smem + Q_FULL, 1);
        barrier_init(smem + Q_EMPTY, CONSUMER_WARPS);
        for (int i = 0; i < K_STAGES; ++i)
            barrier_init(smem + K_FULL + 8 * i, FILLERS), barrier_init(smem + K_EMPTY + 8 * i, CONSUMER_WARPS);
        for (int i = 0; i < V_STAGES; ++i)
            barrier_init(smem + V_FULL + 8 * i, FILLERS), barrier_init(smem + V_EMPTY + 8 * i, CONSUMER_WARPS);
        for (int i = 0; i < STAGING; ++i)
            barrier_init(smem + STAGED_FULL + 8 * i, 1), barrier_init(smem + STAGED_EMPTY + 8 * i, CONVERTERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&pool) : "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&rows_map) : "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        Errand* errands = reinterpret_cast<Errand*>(aligned + ERRANDS_AT);
        if (threadIdx.x < 32) {
            Producer producer{&pool, &rows_map, p, smem, unit, errands, (int)(threadIdx.x & 31)};
            producer.run();
        }
#if FP8_PAGES
        else {
            const Converter converter{smem, errands, uniform((threadIdx.x >> 5) - 1), (int)(threadIdx.x & 31)};
            converter.run();
        }
#endif
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
        consume(p, smem, unit, reinterpret_cast<float*>(aligned + MERGE_AT));
    }
}
