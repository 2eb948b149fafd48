// XXH64, written from the published specification of the xxHash family (algorithm description, XXH64 section).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mtserve {

namespace xxh64_detail {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ull;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Full;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9ull;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ull;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ull;

inline uint64_t rotl(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

// The specification reads lanes little-endian whatever the machine.
inline uint64_t read64(const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

inline uint32_t read32(const uint8_t* at) {
    uint32_t value;
    std::memcpy(&value, at, sizeof value);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap32(value);
#endif
    return value;
}

inline uint64_t round(uint64_t accumulator, uint64_t lane) {
    return rotl(accumulator + lane * kPrime2, 31) * kPrime1;
}

inline uint64_t merge(uint64_t hash, uint64_t accumulator) {
    return (hash ^ round(0, accumulator)) * kPrime1 + kPrime4;
}

// Consumes the 32-byte stripes of `at`, moving it to the remainder.
inline uint64_t stripes(const uint8_t*& at, const uint8_t* end, uint64_t seed) {
    uint64_t a = seed + kPrime1 + kPrime2;
    uint64_t b = seed + kPrime2;
    uint64_t c = seed;
    uint64_t d = seed - kPrime1;
    for (; end - at >= 32; at += 32) {
        a = round(a, read64(at));
        b = round(b, read64(at + 8));
        c = round(c, read64(at + 16));
        d = round(d, read64(at + 24));
    }
    const uint64_t hash = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
    return merge(merge(merge(merge(hash, a), b), c), d);
}

}  // namespace xxh64_detail

inline uint64_t xxh64(const void* data, size_t length, uint64_t seed) {
    using namespace xxh64_detail;
    const uint8_t* at = static_cast<const uint8_t*>(data);
    const uint8_t* end = at + length;
    uint64_t hash = length >= 32 ? stripes(at, end, seed) : seed + kPrime5;
    hash += static_cast<uint64_t>(length);
    for (; end - at >= 8; at += 8) hash = rotl(hash ^ round(0, read64(at)), 27) * kPrime1 + kPrime4;
    if (end - at >= 4) {
        hash = rotl(hash ^ (read32(at) * kPrime1), 23) * kPrime2 + kPrime3;
        at += 4;
    }
    for (; at < end; ++at) hash = rotl(hash ^ (*at * kPrime5), 11) * kPrime1;
    hash = (hash ^ (hash >> 33)) * kPrime2;
    hash = (hash ^ (hash >> 29)) * kPrime3;
    return hash ^ (hash >> 32);
}

}  // namespace mtserve
