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
        parts_.clear();
        lines_ = next_ = per_call_ = 0;
        line_ = end_ = 0;
        calls_ = std::max<int64_t>(1, calls);
        row_ = {};
    }
    // Lists `bytes` of each of some rows.
    void add(const void* first, int64_t row_bytes, int64_t rows, int64_t bytes) {
        if (!first || rows <= 0) return;
        const auto start = reinterpret_cast<uintptr_t>(first);
        parts_.push_back({start, row_bytes, rows, bytes});
        lines_ += rows * ((bytes + (start & (kLine - 1)) + kLine - 1) / kLine);
        per_call_ = (lines_ + calls_ - 1) / calls_;
    }
    void fetch() {
        for (int64_t i = 0; i < per_call_ && (line_ < end_ || next_row()); ++i, line_ += kLine)
            __builtin_prefetch(reinterpret_cast<const void*>(line_), 0, 2);
    }

  private:
    static constexpr uintptr_t kLine = 64;  // bytes that the caches move together
    struct Part {
        uintptr_t start;
        int64_t row_bytes, rows, bytes;
    };

    bool next_row() {
        if (row_.rows == 0) {
            if (next_ == static_cast<int64_t>(parts_.size())) return false;
            row_ = parts_[next_++];
        }
        line_ = row_.start & ~(kLine - 1), end_ = row_.start + row_.bytes;
        row_.start += row_.row_bytes, --row_.rows;
        return true;
    }

    std::vector<Part> parts_;
    Part row_{};                    // the next one, and those of the same part after it
    uintptr_t line_ = 0, end_ = 0;  // what is left of the row before it
    int64_t lines_ = 0, next_ = 0, calls_ = 1, per_call_ = 0;
};

}  // namespace videomamba
