// SiLU of the depthwise causal convolution in front of the scan (Mamba, arXiv 2312.00752, section 3.4).
#pragma once

#include <type_traits>
#include <vector>

#include "arguments.h"
#include "vector.h"
#include "workspace.h"

namespace videomamba {

// Some blocks of channels of a depthwise causal convolution.
template <class T>
struct Convolution {
    const VideoMambaConvolution convolution;
    const int64_t first, count;  // blocks of channels
    Workspace workspace;
    Vector *weight, *bias;  // [block][tap], [block]
    std::vector<T> zeros;   // in place of the steps before the sequence

    Convolution(const VideoMambaConvolution& convolution, int64_t first, int64_t last)
        : convolution(convolution),
          first(first),
          count(last - first),
          workspace(count * (convolution.width + 1)),
          zeros(convolution.channels) {
        const int64_t width = convolution.width;
        weight = workspace.take(count * width);
        bias = workspace.take(count);
        for (int64_t block = 0; block < count; ++block) {
            for (int64_t tap = 0; tap < width; ++tap)
                weight[block * width + tap] = gather(convolution.weight + channel(block) * width, width, tap, lanes(block));
            if (convolution.bias) bias[block] = load(convolution.bias + channel(block), lanes(block));
        }
    }

    int64_t channel(int64_t block) const { return (first + block) * kLanes; }
    int lanes(int64_t block) const { return lanes_at(channel(block), convolution.channels); }

    // The step that `tap` sees from step t.
    int64_t source(int64_t t, int64_t tap) const {
        const int64_t distance = convolution.width - 1 - tap;
        return convolution.reverse ? t + distance : t - distance;
    }

    // Row t of x, before and after it that of the context.
    const T* input(int64_t sample, int64_t t) const {
        if (t >= 0 && t < convolution.length) return row<T>(convolution.x, sample, t);
        if (!convolution.context.data) return zeros.data();
        return row<T>(convolution.context, sample, t < 0 ? t + convolution.width - 1 : t - convolution.length);
    }

    // The rows that the taps see from step t.
    void inputs(int64_t sample, int64_t t, const T** rows) const {
        for (int64_t tap = 0; tap < convolution.width; ++tap) rows[tap] = input(sample, source(t, tap));
    }

    // With a kWidth the number of taps is known to the compiler.
    template <int kWidth>
    Vector output(const T* const* rows, int64_t block, int lanes) const {
        const int64_t width = kWidth ? kWidth : convolution.width;
        const Vector* taps = weight + block * width;
        Vector y = bias[block];
        for (int64_t tap = 0; tap < width; ++tap) y += taps[tap] * load(rows[tap] + channel(block), lanes);
        return y * sigmoid(y);
    }
};

// Calls `function` with the number of taps if it is that of VideoMamba, else with 0.
template <class Function>
void with_width(int64_t width, const Function& function) {
    width == 4 ? function(std::integral_constant<int, 4>()) : function(std::integral_constant<int, 0>());
}

}  // namespace videomamba
