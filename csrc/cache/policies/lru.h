// Least recently used. 16 bytes an entry.
#pragma once

#include "queued.h"

namespace mtserve {

struct NoNote {};

class Lru final : public Queued<NoNote, 1> {
public:
    void insert(Slot slot, const Facts& facts, double) override { push_newest(slot, 0, facts.pages, {}); }
    void access(Slot slot, double) override { move_to_newest(slot, 0); }
    void refresh(Slot slot, double) override { move_to_newest(slot, 0); }
    void remove(Slot slot, bool) override { drop(slot); }
    Slot victim(const Evictable& evictable, double) override { return oldest(0, evictable); }
};

}  // namespace mtserve
