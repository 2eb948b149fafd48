// Strided copies queued one after the other by a function of the CUDA driver, which the caller has looked up: this
// library is built and runs where there is none.
#pragma once

#include <cstdint>

namespace mtserve {

// cuMemcpy2DAsync_v2: CUresult (const CUDA_MEMCPY2D*, CUstream)
using Copy2DFunction = int (*)(const void* shape, void* stream);

// rows[i] rows of `width` bytes, `pitch` apart, from source[i] to to[i]. The first result that is not 0 ends it and is returned.
int copy_strided(Copy2DFunction copy, int64_t count, const int64_t* to, const int64_t* source, const int64_t* rows,
                 int64_t width, int64_t pitch, void* stream);

}  // namespace mtserve
