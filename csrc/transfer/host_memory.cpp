#include "host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/syscall.h>
#endif

#include "../cache/errors.h"

namespace mtserve {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Other threads' mmap and munmap wait while one madvise populates: so long as a few milliseconds at most.
constexpr size_t kPiece = size_t{16} << 20;
constexpr int kMaxThreads = 64;
constexpr int kMaxNodes = 1024;
#ifdef __linux__
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, since Linux 5.14; headers are often older than kernels
constexpr int kPreferred = 1;       // MPOL_PREFERRED of linux/mempolicy.h
#endif
#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

Error no_memory(const std::string& what, int code) {
    return Error("ResourceExhausted", "host_cache", what + ": " + std::generic_category().message(code));
}

// Keeps what the page holds: one read and one write make the system back it.
void touch(char* first, char* last, size_t page) {
    for (volatile char* each = first; each < last; each += page) *each = *each;
}

// 0, or the errno of a system without memory.
int populate_piece(char* first, char* last, size_t page) {
#ifdef __linux__
    int code = EINTR;
    while (code == EINTR) code = madvise(first, static_cast<size_t>(last - first), kPopulateWrite) == 0 ? 0 : errno;
    // Kernels before 5.14 and sandboxes know no such advice.
    if (code != EINVAL && code != EPERM && code != ENOSYS) return code;
#endif
    touch(first, last, page);
    return 0;
}

}  // namespace

HostMemory::HostMemory(int64_t bytes) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), owner_(getpid()) {
    if (bytes < 1) throw invalid_argument("bytes", std::to_string(bytes) + "; a mapping has at least one");
    bytes_ = round_up(static_cast<size_t>(bytes), page_);
    const size_t mapped = bytes_ + kHugePage;
    void* region = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) throw no_memory("mapping " + std::to_string(bytes_) + " bytes failed", errno);
    char* first = static_cast<char*>(region);
    data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(first), kHugePage));
    if (data_ > first) munmap(first, static_cast<size_t>(data_ - first));
    munmap(data_ + bytes_, static_cast<size_t>(first + mapped - (data_ + bytes_)));
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
#ifdef MADV_DONTFORK
    madvise(data_, bytes_, MADV_DONTFORK);
#endif
}

HostMemory::~HostMemory() {
    // In a child of a fork the mapping is not there, and something else may be.
    if (getpid() == owner_) munmap(data_, bytes_);
}

HostMemory::Range HostMemory::pages(int64_t offset, int64_t bytes) const {
    if (offset < 0 || bytes < 0 || offset > this->bytes() || bytes > this->bytes() - offset)
        throw invalid_argument("offset", std::to_string(bytes) + " bytes at " + std::to_string(offset) + " leave a mapping of " +
                                             std::to_string(this->bytes()));
    const size_t first = static_cast<size_t>(offset) / page_ * page_;
    return {data_ + first, data_ + round_up(static_cast<size_t>(offset + bytes), page_)};
}

bool HostMemory::prefer_node(int node) {
    if (node < 0 || node >= kMaxNodes)
        throw invalid_argument("node", std::to_string(node) + " is not in 0.." + std::to_string(kMaxNodes - 1));
#if defined(__linux__) && defined(SYS_mbind)
    constexpr int kBits = 8 * sizeof(unsigned long);
    unsigned long nodes[kMaxNodes / kBits] = {};
    nodes[node / kBits] = 1UL << (node % kBits);
    // The kernel takes one off the count of bits before it reads them.
    return syscall(SYS_mbind, data_, bytes_, kPreferred, nodes, static_cast<unsigned long>(kMaxNodes + 1), 0U) == 0;
#else
    return false;
#endif
}

void HostMemory::populate(int64_t offset, int64_t bytes, int threads) {
    if (threads < 1 || threads > kMaxThreads)
        throw invalid_argument("threads", std::to_string(threads) + " is not in 1.." + std::to_string(kMaxThreads));
    const Range range = pages(offset, bytes);
    const size_t size = bytes ? static_cast<size_t>(range.last - range.first) : 0;
    std::atomic<size_t> next{0};
    std::atomic<int> failed{0};
    const auto work = [&] {
        for (size_t at = next.fetch_add(kPiece); at < size && !failed; at = next.fetch_add(kPiece)) {
            const int code = populate_piece(range.first + at, range.first + std::min(at + kPiece, size), page_);
            if (code) failed = code;
        }
    };
    const size_t helpers = std::min(static_cast<size_t>(threads), round_up(size, kPiece) / kPiece);
    std::vector<std::thread> others;
    others.reserve(helpers);
    try {
        while (others.size() + 1 < helpers) others.emplace_back(work);
    } catch (const std::system_error&) {
        // The threads there are do all the work.
    }
    work();
    for (std::thread& each : others) each.join();
    if (failed) throw no_memory("populating " + std::to_string(size) + " bytes failed", failed);
}

void HostMemory::discard(int64_t offset, int64_t bytes) {
    const Range range = pages(offset, bytes);
    if (range.first != data_ + offset || (range.last != data_ + offset + bytes))
        throw invalid_argument("offset", "only whole pages of " + std::to_string(page_) + " bytes can be given back");
#ifdef MADV_DONTNEED
    if (bytes) madvise(range.first, static_cast<size_t>(bytes), MADV_DONTNEED);
#endif
}

}  // namespace mtserve
