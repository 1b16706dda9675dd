// What the kernels share: memory for a thread, rows of tensors, and the division of work.
#pragma once

#include <algorithm>
#include <memory>
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

// The part that has a unit.
inline int64_t part_of(int64_t unit, int64_t units, int64_t parts) { return ((unit + 1) * parts - 1) / units; }

// Entry `index` of successive rows of a (channels, width) matrix.
inline Vector gather(const float* matrix, int64_t width, int64_t index, int lanes) {
    Vector value{};
    for (int i = 0; i < lanes; ++i) value[i] = matrix[i * width + index];
    return value;
}

// Gradients of parameters, `width` of each channel, which are sums over the batch: threads have samples of their own, and
// what these add is added up in their order.
class SumsOfSamples {
  public:
    SumsOfSamples(int64_t batch, int64_t width, int64_t channels)
        : batch_(batch), width_(width), channels_(channels), values_(new float[batch * width * channels]) {}

    void set(int64_t sample, int64_t index, int64_t channel, Vector value) {
        store(at(sample, index, channel), value, lanes_at(channel, channels_));
    }
    // Those of a parameter (channels, width), which are `width` of all from the first on.
    void add_up(int64_t first, int64_t width, float* matrix) const {
        for (int64_t channel = 0; channel < channels_; channel += kLanes)
            for (int64_t n = 0; n < width; ++n) {
                const Vector total = sum(first + n, channel);
                for (int i = 0; i < lanes_at(channel, channels_); ++i) matrix[(channel + i) * width + n] = total[i];
            }
    }
    // The same of a parameter (width, channels).
    void add_up_rows(int64_t first, int64_t width, float* matrix) const {
        for (int64_t n = 0; n < width; ++n)
            for (int64_t channel = 0; channel < channels_; channel += kLanes)
                store(matrix + n * channels_ + channel, sum(first + n, channel), lanes_at(channel, channels_));
    }

  private:
    float* at(int64_t sample, int64_t index, int64_t channel) const {
        return values_.get() + (sample * width_ + index) * channels_ + channel;
    }
    Vector sum(int64_t index, int64_t channel) const {
        Vector total{};
        for (int64_t sample = 0; sample < batch_; ++sample)
            total += load(at(sample, index, channel), lanes_at(channel, channels_));
        return total;
    }
    const int64_t batch_, width_, channels_;
    const std::unique_ptr<float[]> values_;
};

}  // namespace videomamba
