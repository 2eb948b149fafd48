// One region of host memory that takes no memory until it is populated, piece by piece.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace mtserve {

class HostMemory {
public:
    // Maps `bytes`, rounded up to whole pages of the system. Throws InvalidArgument or ResourceExhausted.
    explicit HostMemory(int64_t bytes);
    ~HostMemory();
    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;

    char* data() const { return data_; }
    int64_t bytes() const { return static_cast<int64_t>(bytes_); }

    // Takes memory of a NUMA node first, for what is populated from now on. Whether the system let us ask for it.
    bool prefer_node(int node);

    // Backs the system's pages that [offset, offset + bytes) touches with memory, on `threads` threads, the caller's
    // among them. What they hold stays. Throws ResourceExhausted where the system has no more; some of the range may be
    // backed by then.
    void populate(int64_t offset, int64_t bytes, int threads);

    // Gives the memory of whole pages back; they read as zero where the system knows how (Linux).
    void discard(int64_t offset, int64_t bytes);

private:
    struct Range {
        char* first;
        char* last;
    };
    Range pages(int64_t offset, int64_t bytes) const;

    char* data_ = nullptr;
    size_t bytes_ = 0;
    size_t page_ = 0;
    pid_t owner_ = 0;
};

}  // namespace mtserve
