// The selective scan on a CPU, forward and backward (Mamba, arXiv 2312.00752, algorithm 2; VideoMamba, section 3.1).
//
// The lanes of a vector are channels. A thread has some blocks of channels and goes through the sequence in chunks: it
// reads the rows of a chunk, runs the recurrence over it block by block, with a few states in registers at a time, and
// writes the rows. What is between stays in the caches, and the states of all steps never exist at once: the backward
// pass recomputes those of a chunk from a checkpoint.

#include "parallel.h"
#include "workspace.h"

namespace videomamba {
namespace {

constexpr int kChunk = 32;  // steps between checkpoints; selective_scan_cpu.py has the same number
constexpr int kStride = kChunk + 1;  // of blocks, so that they don't compete for the same lines of the first cache
constexpr int kGroup = kLanes == 16 ? 8 : 4;  // states in registers at the same time
constexpr int kBackwardGroup = 4;             // the same, of which all that a chunk needs stays in the first cache
constexpr int kBlocks = 128 / kLanes;  // blocks of channels that are read row by row: as many as stay in the caches

// exp(dt * A), for A in units of log2(e).
template <bool kBounded>
Vector decay(Vector dt, Vector A) {
    const Vector exponent = dt * A;
    return exp2_bounded(kBounded ? exponent : bounded(exponent));
}

template <class T>
struct Rows {
    T* first;
    int64_t step;

    T* operator[](int64_t i) const { return first + i * step; }
    explicit operator bool() const { return first != nullptr; }
    // Rows are too far apart for the processor to guess which part of the next ones is wanted.
    void prefetch(int64_t i, int64_t channel) const {
        if (first) __builtin_prefetch((*this)[i + 8] + channel);
    }
};

// What forward and backward know of one sample and some blocks of channels.
template <class T>
struct Share {
    const VideoMambaScan& scan;
    int64_t sample, first, count;
    Vector *A, *A_max;  // A in units of log2(e), [block][state], and the largest |A| of a block
    Vector *D, *dt_bias, *dt_proj;  // dt_proj: [block][rank]
    float *B, *C, *dt_low;  // [step][state] and [step][rank] of a chunk, in the order of the scan

    static int64_t size(const VideoMambaScan& scan, int64_t count) {
        return count * (scan.state + scan.rank + 3) + 2 * vectors(kChunk * scan.state) + vectors(kChunk * scan.rank);
    }

    Share(const VideoMambaScan& scan, int64_t sample, int64_t first, int64_t last, Workspace& workspace)
        : scan(scan), sample(sample), first(first), count(last - first) {
        A = workspace.take(count * scan.state);
        A_max = workspace.take(count);
        D = workspace.take(count);
        dt_bias = workspace.take(count);
        dt_proj = workspace.take(count * scan.rank);
        B = reinterpret_cast<float*>(workspace.take(vectors(kChunk * scan.state)));
        C = reinterpret_cast<float*>(workspace.take(vectors(kChunk * scan.state)));
        dt_low = reinterpret_cast<float*>(workspace.take(vectors(kChunk * scan.rank)));
        for (int64_t block = 0; block < count; ++block) {
            D[block] = load(scan.D + channel(block), lanes(block));
            if (scan.dt_bias) dt_bias[block] = load(scan.dt_bias + channel(block), lanes(block));
            for (int64_t n = 0; n < scan.state; ++n) {
                const Vector a = gather(scan.A + channel(block) * scan.state, scan.state, n, lanes(block)) * kLog2E;
                A[block * scan.state + n] = a;
                A_max[block] = maximum(A_max[block], absolute(a));
            }
            for (int64_t k = 0; k < scan.rank; ++k)
                dt_proj[block * scan.rank + k] = load(scan.dt_proj + k * scan.channels + channel(block), lanes(block));
        }
    }

    int64_t channel(int64_t block) const { return (first + block) * kLanes; }
    int lanes(int64_t block) const { return lanes_at(channel(block), scan.channels); }
    int64_t position(int64_t step) const { return scan.reverse ? scan.length - 1 - step : step; }

    // A chunk of rows, in the order of the scan.
    Rows<T> rows(const VideoMambaSequence& sequence, int64_t start) const {
        if (!sequence.data) return {};
        const int64_t step = scan.reverse ? -sequence.row_stride : sequence.row_stride;
        return {row<T>(sequence, sample, position(start)), step};
    }
    // Calls `function(block, channel, lanes)`, compiled for full vectors and for others.
    template <class Function>
    void for_blocks(int64_t begin, int64_t end, const Function& function) const {
        const int64_t full = std::min(end, scan.channels / kLanes - first);
        for (int64_t block = begin; block < full; ++block) function(block, channel(block), kLanes);
        if (full < end) function(full, channel(full), lanes(full));
    }
    // Of the first state of a block in (batch, state, channels).
    float* states(float* values, int64_t block) const {
        return values + sample * scan.state * scan.channels + channel(block);
    }
    void read_states(const float* source, Vector* h, int64_t block) const {
        for (int64_t n = 0; n < scan.state; ++n) h[n] = load(source + n * scan.channels, lanes(block));
    }
    void write_states(float* target, const Vector* h, int64_t block) const {
        for (int64_t n = 0; n < scan.state; ++n) store(target + n * scan.channels, h[n], lanes(block));
    }
    float* checkpoint(int64_t step, int64_t block) const {
        return states(scan.checkpoints + step / kChunk * scan.batch * scan.state * scan.channels, block);
    }

    // What all channels have in common.
    void read_chunk(int64_t start, int steps) {
        for (int i = 0; i < steps; ++i) {
            const int64_t t = position(start + i);
            copy(row<T>(scan.B, sample, t), scan.state, B + i * scan.state);
            copy(row<T>(scan.C, sample, t), scan.state, C + i * scan.state);
            if (scan.rank) copy(row<T>(scan.dt, sample, t), scan.rank, dt_low + i * scan.rank);
        }
    }
    static void copy(const T* source, int64_t width, float* target) {
        for (int64_t n = 0; n < width; n += kLanes) {
            const int lanes = lanes_at(n, width);
            store(target + n, load(source + n, lanes), lanes);
        }
    }

    // Time steps of a chunk for one block from what `dt_proj` projects, a few steps for each time that it is read.
    void project(int steps, int64_t block, Vector* dt) const {
        constexpr int kSteps = 8;
        static_assert(kChunk % kSteps == 0);  // the last steps may be none of the chunk
        const Vector* weight = dt_proj + block * scan.rank;
        for (int start = 0; start < steps; start += kSteps) {
            Vector sums[kSteps];
            for (int i = 0; i < kSteps; ++i) sums[i] = dt_bias[block];
            for (int64_t k = 0; k < scan.rank; ++k)
                for (int i = 0; i < kSteps; ++i) sums[i] += weight[k] * dt_low[(start + i) * scan.rank + k];
            for (int i = 0; i < kSteps; ++i) dt[start + i] = softplus(sums[i]);
        }
    }

    // Whether no |dt * A| of a chunk can leave the range of the exponential.
    bool is_bounded(const Vector* dt, int steps, int64_t block) const {
        Vector largest{};
        for (int i = 0; i < steps; ++i) largest = maximum(largest, dt[i]);
        largest *= A_max[block];
        for (int i = 0; i < kLanes; ++i)
            if (!(largest[i] <= kExponents)) return false;
        return true;
    }
};

// The recurrence over a chunk for kStates states of one block: y += C . h, with u = dt * x.
template <int kStates, bool kBounded>
void advance(int steps, int64_t state, const Vector* A, const float* B, const float* C, const Vector* dt,
             const Vector* u, Vector* h, Vector* y) {
    Vector a[kStates], states[kStates];
    for (int n = 0; n < kStates; ++n) a[n] = A[n], states[n] = h[n];
    for (int i = 0; i < steps; ++i, B += state, C += state) {
        const Vector dt_i = dt[i], u_i = u[i];
        Vector y_i = y[i];
        for (int n = 0; n < kStates; ++n) {
            states[n] = decay<kBounded>(dt_i, a[n]) * states[n] + u_i * B[n];
            y_i += states[n] * C[n];
        }
        y[i] = y_i;
    }
    for (int n = 0; n < kStates; ++n) h[n] = states[n];
}

template <bool kBounded>
void advance_all(int steps, int64_t state, const Vector* A, const float* B, const float* C, const Vector* dt,
                 const Vector* u, Vector* h, Vector* y) {
    int64_t n = 0;
    for (; n + kGroup <= state; n += kGroup)
        advance<kGroup, kBounded>(steps, state, A + n, B + n, C + n, dt, u, h + n, y);
    for (; n < state; ++n) advance<1, kBounded>(steps, state, A + n, B + n, C + n, dt, u, h + n, y);
}

template <class T>
class Forward {
  public:
    Forward(const VideoMambaScan& scan, int64_t sample, int64_t first, int64_t last)
        : scan_(scan),
          workspace_(Share<T>::size(scan, last - first) + (last - first) * scan.state + 3 * kBlocks * kStride),
          share_(scan, sample, first, last, workspace_) {
        h_ = workspace_.take(share_.count * scan.state);
        dt_ = workspace_.take(kBlocks * kStride);
        u_ = workspace_.take(kBlocks * kStride);
        y_ = workspace_.take(kBlocks * kStride);
    }

    void run() {
        if (scan_.h)
            for (int64_t block = 0; block < share_.count; ++block)
                share_.read_states(share_.states(scan_.h, block), h_ + block * scan_.state, block);
        for (start_ = 0; start_ < scan_.length; start_ += kChunk) {
            steps_ = static_cast<int>(std::min<int64_t>(kChunk, scan_.length - start_));
            share_.read_chunk(start_, steps_);
            for (begin_ = 0; begin_ < share_.count; begin_ += kBlocks) {
                end_ = std::min(share_.count, begin_ + kBlocks);
                read();
                for (int64_t block = begin_; block < end_; ++block) recur(block);
                write();
            }
        }
        if (scan_.h)
            for (int64_t block = 0; block < share_.count; ++block)
                share_.write_states(share_.states(scan_.h, block), h_ + block * scan_.state, block);
    }

  private:
    int64_t at(int64_t block, int i) const { return (block - begin_) * kStride + i; }

    void read() {
        const bool is_projected = scan_.rank;
        if (is_projected)
            for (int64_t block = begin_; block < end_; ++block) share_.project(steps_, block, dt_ + at(block, 0));
        const auto xs = share_.rows(scan_.x, start_), adds = share_.rows(scan_.add, start_);
        const auto dts = is_projected ? Rows<T>{} : share_.rows(scan_.dt, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(begin_, end_, [&](int64_t block, int64_t channel, int lanes) {
                xs.prefetch(i, channel), dts.prefetch(i, channel), adds.prefetch(i, channel);
                const Vector x = load(xs[i] + channel, lanes), D = share_.D[block];
                if (!is_projected)
                    dt_[at(block, i)] = softplus(load(dts[i] + channel, lanes) + share_.dt_bias[block]);
                u_[at(block, i)] = dt_[at(block, i)] * x;
                y_[at(block, i)] = adds ? D * x + load(adds[i] + channel, lanes) : D * x;
            });
    }

    void recur(int64_t block) {
        Vector* h = h_ + block * scan_.state;
        const Vector* dt = dt_ + at(block, 0);
        if (scan_.checkpoints) share_.write_states(share_.checkpoint(start_, block), h, block);
        const auto run = share_.is_bounded(dt, steps_, block) ? advance_all<true> : advance_all<false>;
        const Vector* A = share_.A + block * scan_.state;
        run(steps_, scan_.state, A, share_.B, share_.C, dt, u_ + at(block, 0), h, y_ + at(block, 0));
    }

    void write() {
        const auto ys = share_.rows(scan_.y, start_), zs = share_.rows(scan_.z, start_);
        const auto ungated = share_.rows(scan_.ungated, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(begin_, end_, [&](int64_t block, int64_t channel, int lanes) {
                zs.prefetch(i, channel), ys.prefetch(i, channel);
                Vector y = y_[at(block, i)];
                if (ungated) store(ungated[i] + channel, y, lanes);
                if (zs) {
                    const Vector z = load(zs[i] + channel, lanes);
                    y *= z * sigmoid(z);
                }
                store(ys[i] + channel, y, lanes);
            });
    }

    const VideoMambaScan& scan_;
    Workspace workspace_;
    Share<T> share_;
    Vector *h_, *dt_, *u_, *y_;  // [block][state], [block][step] of the blocks from begin_ to end_
    int64_t start_ = 0, begin_ = 0, end_ = 0;
    int steps_ = 0;
};

// What the adjoint of a chunk needs for one block, [step] each.
struct Adjoint {
    Vector dt[kChunk], dt_slope[kChunk], u[kChunk], grad_y[kChunk];
    Vector grad_u[kChunk], grad_dt[kChunk];
};

// The states of a chunk anew, then the adjoint recurrence g_t = C_t * grad_y_t + exp(dt_{t+1} * A) * g_{t+1}, for
// kStates states of one block. `carry` is exp(dt * A) * g of the step after the chunk, `grad_B` and `grad_C` are
// [step][kStates] sums over blocks.
template <int kStates, bool kBounded>
void retreat(int steps, int64_t state, const Vector* A, const float* B, const float* C, const float* checkpoint,
             int64_t channels, int lanes, Adjoint& block, Vector* carry, Vector* grad_A, Vector* grad_B,
             Vector* grad_C) {
    Vector a[kStates], before[kStates], states[kChunk][kStates], decays[kChunk][kStates];
    for (int n = 0; n < kStates; ++n) a[n] = A[n], before[n] = load(checkpoint + n * channels, lanes);
    Vector h[kStates];
    for (int n = 0; n < kStates; ++n) h[n] = before[n];
    for (int i = 0; i < steps; ++i)
        for (int n = 0; n < kStates; ++n) {
            decays[i][n] = decay<kBounded>(block.dt[i], a[n]);
            h[n] = decays[i][n] * h[n] + block.u[i] * B[i * state + n];
            states[i][n] = h[n];
        }
    Vector g[kStates], sum_A[kStates];
    for (int n = 0; n < kStates; ++n) g[n] = carry[n], sum_A[n] = grad_A[n];
    for (int i = steps - 1; i >= 0; --i) {
        const Vector grad_y = block.grad_y[i], dt = block.dt[i], u = block.u[i];
        Vector grad_u = block.grad_u[i], grad_dt = block.grad_dt[i];
        for (int n = 0; n < kStates; ++n) {
            g[n] += grad_y * C[i * state + n];
            grad_C[i * kStates + n] += grad_y * states[i][n];
            grad_B[i * kStates + n] += u * g[n];
            grad_u += g[n] * B[i * state + n];
            g[n] *= decays[i][n];
            const Vector grad_exponent = g[n] * (i ? states[i - 1][n] : before[n]);
            grad_dt += grad_exponent * a[n];
            sum_A[n] += grad_exponent * dt;
        }
        block.grad_u[i] = grad_u, block.grad_dt[i] = grad_dt;
    }
    for (int n = 0; n < kStates; ++n) carry[n] = g[n], grad_A[n] = sum_A[n];
}

template <class T>
class Backward {
  public:
    Backward(const VideoMambaScan& scan, const VideoMambaScanGradients& gradients, int64_t sample, int64_t slot,
             int64_t first, int64_t last)
        : scan_(scan),
          gradients_(gradients),
          slot_(slot),
          workspace_(Share<T>::size(scan, last - first) + (last - first) * (2 * scan.state + 2) + 2 * kChunk * kBackwardGroup),
          share_(scan, sample, first, last, workspace_),
          adjoints_(std::min<int64_t>(kBlocks, last - first)) {
        carry_ = workspace_.take(share_.count * scan.state);
        grad_A_ = workspace_.take(share_.count * scan.state);
        grad_D_ = workspace_.take(share_.count);
        grad_dt_bias_ = workspace_.take(share_.count);
        grad_B_ = workspace_.take(kChunk * kBackwardGroup);
        grad_C_ = workspace_.take(kChunk * kBackwardGroup);
    }

    void run() {
        const int64_t chunks = (scan_.length + kChunk - 1) / kChunk;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            start_ = chunk * kChunk;
            steps_ = static_cast<int>(std::min<int64_t>(kChunk, scan_.length - start_));
            share_.read_chunk(start_, steps_);
            for (int64_t first = 0; first < share_.count; first += kBlocks) {
                const int64_t last = std::min(share_.count, first + kBlocks);
                prepare(first, last);
                int64_t n = 0;
                for (; n + kBackwardGroup <= scan_.state; n += kBackwardGroup) states<kBackwardGroup>(n, first, last);
                for (; n < scan_.state; ++n) states<1>(n, first, last);
                finish(first, last);
            }
        }
        for (int64_t block = 0; block < share_.count; ++block) {
            share_.write_states(share_.states(gradients_.A, block), grad_A_ + block * scan_.state, block);
            const int64_t offset = share_.sample * scan_.channels + share_.channel(block);
            store(gradients_.D + offset, grad_D_[block], share_.lanes(block));
            store(gradients_.dt_bias + offset, grad_dt_bias_[block], share_.lanes(block));
        }
    }

  private:
    // Through the gate, and the time steps.
    void prepare(int64_t first, int64_t last) {
        const auto xs = share_.rows(scan_.x, start_), dts = share_.rows(scan_.dt, start_);
        const auto zs = share_.rows(scan_.z, start_), ungated = share_.rows(scan_.ungated, start_);
        const auto grad_ys = share_.rows(gradients_.y, start_), grad_zs = share_.rows(gradients_.z, start_);
        const auto grad_adds = share_.rows(gradients_.add, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(first, last, [&](int64_t block, int64_t channel, int lanes) {
                xs.prefetch(i, channel), dts.prefetch(i, channel), grad_ys.prefetch(i, channel);
                zs.prefetch(i, channel), ungated.prefetch(i, channel);
                Adjoint& adjoint = adjoints_[block - first];
                Vector grad_y = load(grad_ys[i] + channel, lanes);
                if (zs) {
                    const Vector z = load(zs[i] + channel, lanes), gate = sigmoid(z);
                    const Vector grad_gate = grad_y * load(ungated[i] + channel, lanes);
                    store(grad_zs[i] + channel, grad_gate * gate * (1.0f + z * (1.0f - gate)), lanes);
                    grad_y *= z * gate;
                    store(grad_adds[i] + channel, grad_y, lanes);
                }
                const Vector v = load(dts[i] + channel, lanes) + share_.dt_bias[block];
                adjoint.dt[i] = softplus(v, &adjoint.dt_slope[i]);
                adjoint.u[i] = adjoint.dt[i] * load(xs[i] + channel, lanes);
                adjoint.grad_y[i] = grad_y;
                adjoint.grad_u[i] = adjoint.grad_dt[i] = Vector{};
            });
    }

    template <int kStates>
    void states(int64_t n, int64_t first, int64_t last) {
        std::fill_n(grad_B_, steps_ * kStates, Vector{});
        std::fill_n(grad_C_, steps_ * kStates, Vector{});
        for (int64_t block = first; block < last; ++block) {
            Adjoint& adjoint = adjoints_[block - first];
            const bool is_bounded = share_.is_bounded(adjoint.dt, steps_, block);
            const auto run = is_bounded ? retreat<kStates, true> : retreat<kStates, false>;
            const int64_t offset = block * scan_.state + n;
            run(steps_, scan_.state, share_.A + offset, share_.B + n, share_.C + n,
                share_.checkpoint(start_, block) + n * scan_.channels, scan_.channels, share_.lanes(block), adjoint,
                carry_ + offset, grad_A_ + offset, grad_B_, grad_C_);
        }
        for (int i = 0; i < steps_; ++i) {
            const int64_t sample = slot_ * scan_.batch + share_.sample;
            const int64_t offset = (sample * scan_.length + share_.position(start_ + i)) * scan_.state + n;
            for (int j = 0; j < kStates; ++j) {
                gradients_.B[offset + j] += sum(grad_B_[i * kStates + j]);
                gradients_.C[offset + j] += sum(grad_C_[i * kStates + j]);
            }
        }
    }

    // From u = dt * x and exp(dt * A) to x and dt, before bias and softplus.
    void finish(int64_t first, int64_t last) {
        const auto xs = share_.rows(scan_.x, start_), grad_xs = share_.rows(gradients_.x, start_);
        const auto grad_dts = share_.rows(gradients_.dt, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(first, last, [&](int64_t block, int64_t channel, int lanes) {
                grad_xs.prefetch(i, channel), grad_dts.prefetch(i, channel);
                const Adjoint& adjoint = adjoints_[block - first];
                const Vector x = load(xs[i] + channel, lanes), grad_y = adjoint.grad_y[i];
                const Vector grad_dt = (adjoint.grad_dt[i] * kLn2 + adjoint.grad_u[i] * x) * adjoint.dt_slope[i];
                const Vector grad_x = adjoint.grad_u[i] * adjoint.dt[i] + grad_y * share_.D[block];
                store(grad_xs[i] + channel, grad_x, lanes);
                store(grad_dts[i] + channel, grad_dt, lanes);
                grad_D_[block] += grad_y * x;
                grad_dt_bias_[block] += grad_dt;
            });
    }

    const VideoMambaScan& scan_;
    const VideoMambaScanGradients& gradients_;
    const int64_t slot_;
    Workspace workspace_;
    Share<T> share_;
    std::vector<Adjoint> adjoints_;
    Vector *carry_, *grad_A_, *grad_D_, *grad_dt_bias_, *grad_B_, *grad_C_;
    int64_t start_ = 0;
    int steps_ = 0;
};

template <class T>
void forward_all(const VideoMambaScan& scan) {
    const int64_t blocks = vectors(scan.channels), parts = std::min(scan.threads, scan.batch * blocks);
    parallel(parts, [&](int64_t part) {
        for_share(scan.batch, blocks, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            Forward<T>(scan, sample, first, last).run();
        });
    });
}

template <class T>
void backward_all(const VideoMambaScan& scan, const VideoMambaScanGradients& gradients) {
    const int64_t blocks = vectors(scan.channels), units = scan.batch * blocks, parts = std::min(scan.threads, units);
    parallel(parts, [&](int64_t part) {
        for_share(scan.batch, blocks, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            // the part that has the first block of this sample has slot 0
            const int64_t first_part = ((sample * blocks + 1) * parts - 1) / units;
            Backward<T>(scan, gradients, sample, part - first_part, first, last).run();
        });
    });
}

}  // namespace
}  // namespace videomamba

using namespace videomamba;

extern "C" __attribute__((visibility("default"))) int64_t videomamba_version() { return kVersion; }

extern "C" __attribute__((visibility("default"))) void videomamba_selective_scan(const VideoMambaScan* scan) {
    switch (scan->dtype) {
        case kFloat32: return forward_all<float>(*scan);
        case kBFloat16: return forward_all<BFloat16>(*scan);
        case kFloat16: return forward_all<Half>(*scan);
    }
}

extern "C" __attribute__((visibility("default"))) void videomamba_selective_scan_backward(
    const VideoMambaScan* scan, const VideoMambaScanGradients* gradients) {
    switch (scan->dtype) {
        case kFloat32: return backward_all<float>(*scan, *gradients);
        case kBFloat16: return backward_all<BFloat16>(*scan, *gradients);
        case kFloat16: return backward_all<Half>(*scan, *gradients);
    }
}
