// SiLU of the depthwise causal convolution in front of the scan (Mamba, arXiv 2312.00752, section 3.4), on a CPU.

#include "ahead.h"
#include "convolution.h"
#include "parallel.h"
#include "workspace.h"

#include <optional>

namespace videomamba {
namespace {

constexpr int kChunk = 64;             // steps, and
constexpr int kBlocks = 256 / kLanes;  // blocks of channels whose rows, weights and gradients stay in the first cache
constexpr int kBackwardBlocks = 64 / kLanes;  // the same, with what the gradients of a chunk need
constexpr int kGroup = 8;              // steps, or outputs of x_proj, that are in registers at the same time
constexpr int kAhead = 4;              // rows, of which the processor can't guess which part is wanted

template <class T, int kWidth>
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
                    store(target + block * kLanes, kernel.template output<kWidth>(rows.data(), block, lanes), lanes);
                };
                const int64_t end = std::min(begin + kBlocks, kernel.count);
                for (int64_t block = begin; block < std::min(end, full); ++block) write(block, kLanes);
                if (end > full) write(full, kernel.lanes(full));
            }
}

inline int64_t whole_groups(int64_t count) { return (count + kGroup - 1) / kGroup * kGroup; }

// x_proj, which makes what the scan needs of the output of the convolution, for some blocks of channels of one sample:
// its own gradient, and what it adds to that of its input.
class Projection {
  public:
    Projection(const VideoMambaConvolutionGradients& gradients, int64_t channels, int64_t first, int64_t count,
               int64_t steps)
        : outputs_(gradients.outputs),
          stride_(whole_groups(outputs_)),
          workspace_(count * (outputs_ + stride_)),
          rows_(whole_groups(steps) * stride_) {
        weight_ = workspace_.take(count * outputs_);
        grad_weight_ = workspace_.take(count * stride_);
        for (int64_t block = 0; block < count; ++block)
            for (int64_t k = 0; k < outputs_; ++k) {
                const int64_t channel = (first + block) * kLanes;
                weight_[block * outputs_ + k] =
                    load(gradients.x_proj + k * channels + channel, lanes_at(channel, channels));
            }
    }

    // The gradient of what it makes of step i, zero of none.
    void read(int64_t i, const float* projected) {
        float* row = rows_.data() + i * stride_;
        projected ? std::copy_n(projected, outputs_, row) : std::fill_n(row, outputs_, 0.0f);
    }

    // Adds to the gradients of the input, [step].
    void add_to(Vector* grad, int64_t steps, int64_t block) const {
        const Vector* weight = weight_ + block * outputs_;
        for (int64_t start = 0; start < steps; start += kGroup) {
            const float* rows = rows_.data() + start * stride_;
            Vector sums[kGroup];
            std::copy_n(grad + start, kGroup, sums);
            for (int64_t k = 0; k < outputs_; ++k)
                for (int i = 0; i < kGroup; ++i) sums[i] += weight[k] * rows[i * stride_ + k];
            std::copy_n(sums, kGroup, grad + start);
        }
    }

    // Adds to its own gradient what the inputs of these steps, from the first that was read on, give.
    void add_inputs(const Vector* inputs, int64_t steps, int64_t block) {
        for (int64_t k = 0; k < stride_; k += kGroup) {
            Vector sums[kGroup], *grad_weight = grad_weight_ + block * stride_ + k;
            std::copy_n(grad_weight, kGroup, sums);
            for (int64_t i = 0; i < steps; ++i)
                for (int j = 0; j < kGroup; ++j) sums[j] += inputs[i] * rows_[i * stride_ + k + j];
            std::copy_n(sums, kGroup, grad_weight);
        }
    }

    const Vector* gradient(int64_t block) const { return grad_weight_ + block * stride_; }

  private:
    const int64_t outputs_, stride_;
    Workspace workspace_;
    Vector *weight_, *grad_weight_;  // [block][output]
    std::vector<float> rows_;        // [step][output]
};

// Of one sample and some blocks of channels. With a kWidth the number of taps is known to the compiler.
template <class T, int kWidth>
class Backward {
  public:
    Backward(const VideoMambaConvolution& convolution, const VideoMambaConvolutionGradients& gradients, int64_t sample,
             int64_t first, int64_t last)
        : kernel_(convolution, first, last),
          sample_(sample),
          length_(convolution.length),
          width_(kWidth ? kWidth : convolution.width),
          outputs_(gradients.outputs),
          grads_stride_(whole_groups(kChunk + width_ - 1)),
          workspace_(kBackwardBlocks * (kChunk + 2 * (width_ - 1) + grads_stride_) + kernel_.count * (width_ + 1)),
          x_(rows(convolution.x)),
          grad_y_(rows(gradients.y)),
          grad_x_(rows(gradients.x)),
          add_(rows(gradients.add)) {
        xs_ = workspace_.take(kBackwardBlocks * (kChunk + 2 * (width_ - 1)));
        grads_ = workspace_.take(kBackwardBlocks * grads_stride_);
        grad_weight_ = workspace_.take(kernel_.count * width_);
        grad_bias_ = workspace_.take(kernel_.count);
        if (!gradients.x_proj) return;
        projection_.emplace(gradients, convolution.channels, first, kernel_.count, kChunk + width_ - 1);
        projected_ = videomamba::rows<const float>(
            {const_cast<float*>(gradients.projected), length_ * gradients.outputs, gradients.outputs}, sample, length_,
            convolution.reverse, 0);
    }

    // The gradients of the weight, the bias and x_proj go into `sums`.
    void run(SumsOfSamples& sums) {
        for (start_ = 0; start_ < length_; start_ += kChunk) {
            steps_ = std::min<int64_t>(kChunk, length_ - start_);
            look_ahead();
            for (int64_t i = 0; projection_ && i < steps_ + margin(); ++i)
                projection_->read(i, start_ + i < length_ ? projected_[start_ + i] : nullptr);
            for (begin_ = 0; begin_ < kernel_.count; begin_ += kBackwardBlocks) {
                end_ = std::min(begin_ + kBackwardBlocks, kernel_.count);
                read();
                for (int64_t block = begin_; block < end_; ++block) backward(block);
                write();
            }
        }
        for (int64_t block = 0; block < kernel_.count; ++block) {
            const int64_t channel = kernel_.channel(block);
            for (int64_t tap = 0; tap < width_; ++tap) sums.set(sample_, tap, channel, grad_weight_[block * width_ + tap]);
            sums.set(sample_, width_, channel, grad_bias_[block]);
            for (int64_t k = 0; projection_ && k < outputs_; ++k)
                sums.set(sample_, width_ + 1 + k, channel, projection_->gradient(block)[k]);
        }
    }

  private:
    int64_t width() const { return kWidth ? kWidth : width_; }
    Rows<T> rows(const VideoMambaSequence& sequence) const {
        const auto& convolution = kernel_.convolution;
        return videomamba::rows<T>(sequence, sample_, convolution.length, convolution.reverse, 0);
    }

    int64_t margin() const { return width() - 1; }
    Vector* xs(int64_t block) const { return xs_ + (block - begin_) * (kChunk + 2 * margin()); }
    Vector* grads(int64_t block) const { return grads_ + (block - begin_) * grads_stride_; }

    // The rows of the next chunk.
    void look_ahead() {
        const int64_t start = start_ + steps_, steps = std::min<int64_t>(kChunk, length_ - start);
        const int64_t channel = kernel_.channel(0);
        const int64_t part = std::min(kernel_.count * kLanes, kernel_.convolution.channels - channel);
        ahead_.start(kernel_.count * steps_);
        for (const auto& rows : {x_, grad_y_, grad_x_})
            ahead_.add(rows[start] + channel, rows.step * sizeof(T), steps, part * sizeof(T));
    }

    // Steps in the order of the scan. The gradient of x at a step needs those before the SiLU of the steps that see it,
    // of which there are `margin` after the chunk, and these need x of the steps that they see.
    void read() {
        const int64_t margin = this->margin();
        for (int64_t i = 0; i < steps_ + 2 * margin; ++i) {
            const int64_t t = start_ - margin + i;
            const bool is_inside = t >= 0 && t < length_;
            for_blocks([&](int64_t block, int64_t channel, int lanes) {
                xs(block)[i] = is_inside ? load(x_[t] + channel, lanes) : Vector{};
                if (i >= margin) grads(block)[i - margin] = is_inside ? load(grad_y_[t] + channel, lanes) : Vector{};
            });
        }
    }

    void backward(int64_t block) {
        const Vector* weight = kernel_.weight + block * width();
        Vector* sums = grad_weight_ + block * width();
        if constexpr (kWidth == 0) {
            backward(block, weight, sums);
        } else {
            Vector local_weight[kWidth], local_sums[kWidth];  // in registers
            std::copy_n(weight, kWidth, local_weight), std::copy_n(sums, kWidth, local_sums);
            backward(block, local_weight, local_sums);
            std::copy_n(local_sums, kWidth, sums);
        }
    }

    // With the weight of the block and its gradient.
    template <class Weight, class Sums>
    void backward(int64_t block, const Weight& weight, Sums& sums) {
        const int64_t margin = this->margin(), steps = steps_;
        const Vector *x = xs(block), bias = kernel_.bias[block];
        Vector *grad = grads(block), grad_bias = grad_bias_[block];
        if (projection_) projection_->add_to(grad, steps + margin, block);
        Vector outputs[kChunk];
        const auto through_silu = [&](int64_t i) {
            Vector y = bias;
            for (int64_t tap = 0; tap < width(); ++tap) y += weight[tap] * x[i + tap];
            const Vector gate = sigmoid(y);
            if (i < kChunk) outputs[i] = y * gate;
            return grad[i] * (gate * (1.0f + y * (1.0f - gate)));
        };
        for (int64_t i = 0; i < steps; ++i) {
            ahead_.fetch();
            const Vector grad_y = through_silu(i);
            for (int64_t tap = 0; tap < width(); ++tap) sums[tap] += grad_y * x[i + tap];
            grad_bias += grad_y;
            grad[i] = grad_y;
        }
        if (projection_) projection_->add_inputs(outputs, steps, block);
        for (int64_t i = steps; i < steps + margin; ++i) grad[i] = through_silu(i);
        for (int64_t i = 0; i < steps; ++i) {
            Vector grad_x{};
            for (int64_t tap = 0; tap < width(); ++tap) grad_x += weight[tap] * grad[i + margin - tap];
            grad[i] = grad_x;
        }
        grad_bias_[block] = grad_bias;
    }

    void write() {
        for (int64_t i = 0; i < steps_; ++i)
            for_blocks([&](int64_t block, int64_t channel, int lanes) {
                Vector grad_x = grads(block)[i];
                if (add_) grad_x += load(add_[start_ + i] + channel, lanes);
                store(grad_x_[start_ + i] + channel, grad_x, lanes);
            });
    }

    // Calls `function(block, channel, lanes)`, compiled for full vectors and for others.
    template <class Function>
    void for_blocks(const Function& function) const {
        const int64_t full = std::min(end_, kernel_.convolution.channels / kLanes - kernel_.first);
        for (int64_t block = begin_; block < full; ++block) function(block, kernel_.channel(block), kLanes);
        if (full < end_) function(full, kernel_.channel(full), kernel_.lanes(full));
    }

    const Convolution<T> kernel_;
    const int64_t sample_, length_, width_, outputs_, grads_stride_;
    Workspace workspace_;
    const Rows<T> x_, grad_y_, grad_x_, add_;
    Vector *xs_, *grads_;  // [block][step], x from `margin` steps before a chunk to as many after it, like the gradients
    Vector *grad_weight_, *grad_bias_;  // [block][tap], [block]
    std::optional<Projection> projection_;
    Rows<const float> projected_{};
    Ahead ahead_;
    int64_t start_ = 0, steps_ = 0, begin_ = 0, end_ = 0;
};

template <class T>
void forward_all(const VideoMambaConvolution& convolution) {
    const int64_t parts = std::min(convolution.threads, convolution.batch * convolution.length);
    parallel(parts, [&](int64_t part) {
        for_share(convolution.batch, convolution.length, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            with_width(convolution.width, [&](auto width) { forward<T, width>(convolution, sample, first, last); });
        });
    });
}

template <class T>
void backward_all(const VideoMambaConvolution& convolution, const VideoMambaConvolutionGradients& gradients) {
    const int64_t blocks = vectors(convolution.channels), parts = std::min(convolution.threads, convolution.batch * blocks);
    SumsOfSamples sums(convolution.batch, convolution.width + 1 + gradients.outputs, convolution.channels);
    parallel(parts, [&](int64_t part) {
        for_share(convolution.batch, blocks, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            with_width(convolution.width, [&](auto width) {
                Backward<T, width>(convolution, gradients, sample, first, last).run(sums);
            });
        });
    });
    sums.add_up(0, convolution.width, gradients.weight);
    sums.add_up(convolution.width, 1, gradients.bias);
    sums.add_up_rows(convolution.width + 1, gradients.outputs, gradients.x_proj_gradient);
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
