// Memory that will be wanted next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace videomamba {

// Parts of rows that the next piece of work reads or writes. They are too far apart for the processor to guess them, and
// come into the second cache while the work before it computes.
class Ahead {
  public:
    // Forgets what was listed before. There will be so many calls of `fetch`.
    void start(int64_t calls) {
        lines_.clear();
        next_ = 0;
        calls_ = std::max<int64_t>(1, calls);
    }
    // Lists `bytes` of each of some rows.
    void add(const void* first, int64_t row_bytes, int64_t rows, int64_t bytes) {
        if (!first) return;
        for (int64_t i = 0; i < rows; ++i) {
            const auto begin = reinterpret_cast<uintptr_t>(first) + i * row_bytes, end = begin + bytes;
            for (uintptr_t line = begin & ~uintptr_t{kLine - 1}; line < end; line += kLine) lines_.push_back(line);
        }
        per_call_ = (static_cast<int64_t>(lines_.size()) + calls_ - 1) / calls_;
    }
    void fetch() {
        const int64_t end = std::min(next_ + per_call_, static_cast<int64_t>(lines_.size()));
        for (; next_ < end; ++next_) __builtin_prefetch(reinterpret_cast<const void*>(lines_[next_]), 0, 2);
    }

  private:
    static constexpr uintptr_t kLine = 64;  // bytes that the caches move together
    std::vector<uintptr_t> lines_;
    int64_t next_ = 0, calls_ = 1, per_call_ = 0;
};

}  // namespace videomamba
