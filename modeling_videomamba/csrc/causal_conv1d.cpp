// SiLU of the depthwise causal convolution in front of the scan (Mamba, arXiv 2312.00752, section 3.4), on a CPU.

#include "ahead.h"
#include "parallel.h"
#include "workspace.h"

namespace videomamba {
namespace {

constexpr int kChunk = 64;             // steps, and
constexpr int kBlocks = 256 / kLanes;  // blocks of channels whose rows, weights and gradients stay in the first cache
constexpr int kAhead = 4;              // rows, of which the processor can't guess which part is wanted

template <class T>
struct Convolution {
    const VideoMambaConvolution& convolution;
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

    Vector before_silu(const T* const* rows, int64_t block, int lanes) const {
        const Vector* taps = weight + block * convolution.width;
        Vector y = bias[block];
        for (int64_t tap = 0; tap < convolution.width; ++tap) y += taps[tap] * load(rows[tap] + channel(block), lanes);
        return y;
    }
};

template <class T>
void forward(const VideoMambaConvolution& convolution, int64_t sample, int64_t first, int64_t last) {
    const Convolution<T> kernel(convolution, 0, vectors(convolution.channels));
    const int64_t full = convolution.channels / kLanes, ahead = kAhead * convolution.x.row_stride;
    std::vector<const T*> rows(convolution.width);
    for (int64_t start = first; start < last; start += kChunk)
        for (int64_t begin = 0; begin < kernel.count; begin += kBlocks)
            for (int64_t t = start; t < std::min(start + kChunk, last); ++t) {
                kernel.inputs(sample, t, rows.data());
                const T* x = row<T>(convolution.x, sample, t);
                T* target = row<T>(convolution.y, sample, t);
                const auto write = [&](int64_t block, int lanes) {
                    __builtin_prefetch(x + ahead + block * kLanes);
                    const Vector y = kernel.before_silu(rows.data(), block, lanes);
                    store(target + block * kLanes, y * sigmoid(y), lanes);
                };
                const int64_t end = std::min(begin + kBlocks, kernel.count);
                for (int64_t block = begin; block < std::min(end, full); ++block) write(block, kLanes);
                if (end > full) write(full, kernel.lanes(full));
            }
}

template <class T>
void backward(const VideoMambaConvolution& convolution, const VideoMambaConvolutionGradients& gradients, int64_t sample,
              int64_t first, int64_t last) {
    const Convolution<T> kernel(convolution, first, last);
    const int64_t length = convolution.length, channels = convolution.channels, width = convolution.width;
    // The gradient of x at a step needs those before the SiLU of the `margin` steps that see it, each of which needs x of
    // the `margin` steps that it sees.
    const int64_t margin = width - 1;
    Workspace workspace(2 * kChunk + 6 * margin + kernel.count * (width + 1));
    Vector *xs = workspace.take(kChunk + 4 * margin), *grads = workspace.take(kChunk + 2 * margin),
           *grad_weight = workspace.take(kernel.count * width), *grad_bias = workspace.take(kernel.count);
    Ahead ahead;
    const auto will_want = [&](const VideoMambaSequence& sequence, int64_t begin, int64_t end) {
        if (begin >= end) return;
        const int64_t part = std::min(kernel.count * kLanes, channels - kernel.channel(0));
        ahead.add(row<T>(sequence, sample, begin) + kernel.channel(0), sequence.row_stride * sizeof(T), end - begin,
                  part * sizeof(T));
    };
    for (int64_t start = 0; start < length; start += kChunk) {
        const int64_t end = std::min(start + kChunk, length), next_end = std::min(end + kChunk, length);
        ahead.start(kernel.count * (end - start));
        for (const auto& sequence : {convolution.x, gradients.y, gradients.x}) will_want(sequence, end, next_end);
        const auto backward_block = [&](int64_t block, int lanes) {
            const int64_t channel = kernel.channel(block);
            const Vector* weight = kernel.weight + block * width;
            const auto x_at = [&](int64_t t) -> Vector& { return xs[t - start + 2 * margin]; };
            const auto grad_at = [&](int64_t t) -> Vector& { return grads[t - start + margin]; };
            const auto is_inside = [&](int64_t t) { return t >= 0 && t < length; };
            for (int64_t t = start - 2 * margin; t < end + 2 * margin; ++t)
                x_at(t) = is_inside(t) ? load(row<T>(convolution.x, sample, t) + channel, lanes) : Vector{};
            for (int64_t t = start - margin; t < end + margin; ++t) {
                Vector y = kernel.bias[block];
                for (int64_t tap = 0; tap < width; ++tap) y += weight[tap] * x_at(kernel.source(t, tap));
                const Vector gate = sigmoid(y), slope = gate * (1.0f + y * (1.0f - gate));
                grad_at(t) = is_inside(t) ? slope * load(row<T>(gradients.y, sample, t) + channel, lanes) : Vector{};
            }
            for (int64_t t = start; t < end; ++t) {
                ahead.fetch();
                Vector grad_x{};
                if (gradients.add.data) grad_x = load(row<T>(gradients.add, sample, t) + channel, lanes);
                for (int64_t tap = 0; tap < width; ++tap)
                    grad_x += weight[tap] * grad_at(t + (t - kernel.source(t, tap)));  // the step that sees t
                store(row<T>(gradients.x, sample, t) + channel, grad_x, lanes);
            }
            for (int64_t tap = 0; tap < width; ++tap) {
                Vector total{};
                for (int64_t t = start; t < end; ++t) total += grad_at(t) * x_at(kernel.source(t, tap));
                grad_weight[block * width + tap] += total;
            }
            for (int64_t t = start; t < end; ++t) grad_bias[block] += grad_at(t);
        };
        for (int64_t block = 0; block < kernel.count; ++block) {
            if (kernel.lanes(block) == kLanes)
                backward_block(block, kLanes);
            else
                backward_block(block, kernel.lanes(block));
        }
    }
    for (int64_t block = 0; block < kernel.count; ++block) {
        const int64_t channel = kernel.channel(block);
        for (int64_t tap = 0; tap < width; ++tap)
            store(gradients.weight + (sample * width + tap) * channels + channel, grad_weight[block * width + tap],
                  kernel.lanes(block));
        store(gradients.bias + sample * channels + channel, grad_bias[block], kernel.lanes(block));
    }
}

template <class T>
void forward_all(const VideoMambaConvolution& convolution) {
    const int64_t parts = std::min(convolution.threads, convolution.batch * convolution.length);
    parallel(parts, [&](int64_t part) {
        for_share(convolution.batch, convolution.length, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            forward<T>(convolution, sample, first, last);
        });
    });
}

template <class T>
void backward_all(const VideoMambaConvolution& convolution, const VideoMambaConvolutionGradients& gradients) {
    const int64_t blocks = vectors(convolution.channels), parts = std::min(convolution.threads, convolution.batch * blocks);
    parallel(parts, [&](int64_t part) {
        for_share(convolution.batch, blocks, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            backward<T>(convolution, gradients, sample, first, last);
        });
    });
}

}  // namespace
}  // namespace videomamba

using namespace videomamba;

extern "C" __attribute__((visibility("default"))) void videomamba_causal_conv1d(const VideoMambaConvolution* convolution) {
    switch (convolution->dtype) {
        case kFloat32: return forward_all<float>(*convolution);
        case kBFloat16: return forward_all<BFloat16>(*convolution);
        case kFloat16: return forward_all<Half>(*convolution);
    }
}

extern "C" __attribute__((visibility("default"))) void videomamba_causal_conv1d_backward(
    const VideoMambaConvolution* convolution, const VideoMambaConvolutionGradients* gradients) {
    switch (convolution->dtype) {
        case kFloat32: return backward_all<float>(*convolution, *gradients);
        case kBFloat16: return backward_all<BFloat16>(*convolution, *gradients);
        case kFloat16: return backward_all<Half>(*convolution, *gradients);
    }
}
