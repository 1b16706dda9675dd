// What the kernels share: memory for a thread, rows of tensors, and the division of work.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "vector.h"

namespace videomamba {

// Vectors for the work of one thread, zero at first.
class Workspace {
  public:
    explicit Workspace(int64_t vectors) : cells_(vectors) {}
    Vector* take(int64_t vectors) {
        Vector* taken = &cells_[taken_].vector;
        taken_ += vectors;
        return taken;
    }

  private:
    struct Cell {
        Vector vector;
    };
    std::vector<Cell> cells_;
    int64_t taken_ = 0;
};

template <class T>
T* row(const VideoMambaSequence& sequence, int64_t sample, int64_t t) {
    return static_cast<T*>(sequence.data) + sample * sequence.batch_stride + t * sequence.row_stride;
}

// Rows in the order of a scan.
template <class T>
struct Rows {
    T* first;
    int64_t step;

    T* operator[](int64_t i) const { return first + i * step; }
    explicit operator bool() const { return first != nullptr; }
};

// From step `start` of the scan on; none of an absent tensor.
template <class T>
Rows<T> rows(const VideoMambaSequence& sequence, int64_t sample, int64_t length, bool reverse, int64_t start) {
    if (!sequence.data) return {};
    if (reverse) return {row<T>(sequence, sample, length - 1 - start), -sequence.row_stride};
    return {row<T>(sequence, sample, start), sequence.row_stride};
}

inline int64_t vectors(int64_t width) { return (width + kLanes - 1) / kLanes; }

// Entries of the block of channels that starts at `channel`.
inline int lanes_at(int64_t channel, int64_t channels) { return static_cast<int>(std::min<int64_t>(kLanes, channels - channel)); }

// Calls `function(sample, first block, last block + 1)` for the share of one part in `batch * blocks` units.
template <class Function>
void for_share(int64_t batch, int64_t blocks, int64_t part, int64_t parts, const Function& function) {
    const int64_t last = batch * blocks * (part + 1) / parts;
    for (int64_t unit = batch * blocks * part / parts; unit < last;) {
        const int64_t sample = unit / blocks, first = unit % blocks;
        const int64_t count = std::min(blocks - first, last - unit);
        function(sample, first, first + count);
        unit += count;
    }
}

// Entry `index` of successive rows of a (channels, width) matrix.
inline Vector gather(const float* matrix, int64_t width, int64_t index, int lanes) {
    Vector value{};
    for (int i = 0; i < lanes; ++i) value[i] = matrix[i * width + index];
    return value;
}

}  // namespace videomamba
