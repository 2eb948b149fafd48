// What the kernels that make K and V from packed pages are given. Included after hopper.cuh.

constexpr int PAGE = 64;          // tokens
constexpr int MOST_PAGES = 896;   // of a launch: parameters and tensor map stay below 4 KiB

// Mirrored by `Params` in mtserve/kernels/unpack/cuda.py. Strides of the pool count elements. A layer of a packed page
// is its rows' codes [sides, 64, row bytes] and, peaks_offset bytes on, their peaks in bf16 [sides, 64, groups].
struct Params {
    const unsigned char* packed;
    Elem* pool;
    const Elem* bias;         // [all layers, 2 width]: v, k; not of kv8, like depth
    long long page_bytes;     // from one packed page to the next
    long long page_stride;
    long long layer_stride;   // of K; V follows 64 * width on
    int layer_bytes;          // from one packed layer to the next
    int peaks_offset;
    int width;                // H * D
    int head_dim;             // D
    int depth;                // d
    int first, last;          // layers [first, last)
    int count;                // of pages
    int pages[MOST_PAGES];    // ids, of packed pages as of the pool's
};

// Read past L1: what a copy brought since the last launch is seen.
__device__ __forceinline__ float load_peak(const unsigned char* from) {
    return __uint_as_float((u32)__ldcg(reinterpret_cast<const unsigned short*>(from)) << 16);
}

// Two of the codes in a word's bytes, as exact elements: int8 under a byte that makes them 128 + code mod 128 in bf16
// (1024 + code mod 128 in fp16), minus the same byte over the sign alone. `PAIR`: 0 of bytes 0 and 1, 1 of 2 and 3.
constexpr u32 MAGIC = FP16 ? 0x64646464u : 0x43434343u;
__device__ __forceinline__ u32 difference(u32 a, u32 b) {
    u32 d;
    asm("sub.rn." ELEM_NAME "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <int PAIR>
__device__ __forceinline__ u32 elements_of_bytes(u32 word) {
    const u32 x = __byte_perm(word, MAGIC, PAIR ? 0x4342 : 0x4140);
    return difference(x & 0xff7fff7fu, x & 0xff80ff80u);
}
