// The selective scan on a CPU, forward and backward (Mamba, arXiv 2312.00752, algorithm 2; VideoMamba, section 3.1).
//
// The lanes of a vector are channels. A thread has some blocks of channels and goes through the sequence in chunks: it
// reads the rows of a chunk, runs the recurrence over it block by block, with a few states in registers at a time, and
// writes the rows. What is between stays in the caches, and the states of all steps never exist at once: the backward
// pass recomputes those of a chunk from a checkpoint.

#include "ahead.h"
#include "convolution.h"
#include "parallel.h"
#include "workspace.h"

#include <memory>
#include <optional>

namespace videomamba {
namespace {

constexpr int kChunk = 32;  // steps between checkpoints; selective_scan_cpu.py has the same number
static_assert(kChunk % kLanes == 0);
constexpr int kStride = kChunk + 1;  // of blocks, so that they don't compete for the same lines of the first cache
// Vectors between arrays that are written and read in turn. At a distance of 4096 bytes the processor would take what it
// reads for what it has just written.
constexpr int kDistance = 1024 / sizeof(Vector);
constexpr int kGroup = kLanes == 16 ? 8 : 4;  // states in registers at the same time
constexpr int kBackwardGroup = 4;             // the same, of which all that a chunk needs stays in the first cache
constexpr int kBlocks = 128 / kLanes;  // blocks of channels that are read row by row: as many as stay in the caches

// exp(dt * A), for A in units of log2(e).
template <bool kBounded>
Vector decay(Vector dt, Vector A) {
    const Vector exponent = dt * A;
    return kBounded ? exp2_bounded(exponent) : exp2(exponent);
}

// What forward and backward know of one sample and some blocks of channels, with kStates states in registers.
template <class T, int kStates>
struct Share {
    const VideoMambaScan& scan;
    int64_t sample, first, count;
    Vector *A, *A_max;  // A in units of log2(e), [block][state], and the largest |A| of a block
    Vector *D, *dt_bias, *dt_proj;  // dt_proj: [block][rank]
    float *B, *C, *dt_low;  // of a chunk in the order of the scan, see `of_group`

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
                // infinity times a time step of 0 would be a NaN; of a NaN, the exponential takes one without a payload
                A[block * scan.state + n] = a == a ? at_least(a, -kLargest) : broadcast(kNaN);
                A_max[block] = maximum(A_max[block], absolute(a));
            }
            for (int64_t k = 0; k < scan.rank; ++k)
                dt_proj[block * scan.rank + k] = gather(scan.dt_proj + channel(block) * scan.rank, scan.rank, k, lanes(block));
        }
    }

    int64_t channel(int64_t block) const { return (first + block) * kLanes; }
    int lanes(int64_t block) const { return lanes_at(channel(block), scan.channels); }
    int64_t position(int64_t step) const { return scan.reverse ? scan.length - 1 - step : step; }

    Rows<T> rows(const VideoMambaSequence& sequence, int64_t start) const {
        return videomamba::rows<T>(sequence, sample, scan.length, scan.reverse, start);
    }
    // Lists the rows of a chunk, of the blocks from `begin` to `end`, and the states before it.
    void will_want(Ahead& ahead, const VideoMambaSequence& sequence, int64_t start, int64_t begin, int64_t end) const {
        const auto rows = this->rows(sequence, start);
        if (!rows) return;
        const int64_t steps = std::min<int64_t>(kChunk, scan.length - start);
        const int64_t width = std::min((end - begin) * kLanes, scan.channels - channel(begin));
        ahead.add(rows[0] + channel(begin), rows.step * sizeof(T), steps, width * sizeof(T));
    }
    void will_want_checkpoint(Ahead& ahead, int64_t start, int64_t begin, int64_t end) const {
        if (!scan.checkpoints) return;
        const int64_t width = std::min((end - begin) * kLanes, scan.channels - channel(begin));
        ahead.add(checkpoint(start, begin), scan.channels * sizeof(float), scan.state, width * sizeof(float));
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

    // Calls `function(first, how many)` for groups of the states or ranks, as many as are in registers.
    template <class Function>
    static void for_groups(int64_t width, const Function& function) {
        int64_t n = 0;
        for (; n + kStates <= width; n += kStates) function(n, std::integral_constant<int, kStates>());
        for (; n < width; ++n) function(n, std::integral_constant<int, 1>());
    }
    static int64_t groups(int64_t width) { return width / kStates + width % kStates; }
    // B, C or dt_low of the group from n on: [step][state or rank].
    static float* of_group(float* values, int64_t n) { return values + n * kChunk; }

    // What all channels have in common.
    void read_chunk(int64_t start, int steps) {
        read_chunk(scan.B, start, steps, scan.state, B);
        read_chunk(scan.C, start, steps, scan.state, C);
        if (scan.rank) read_chunk(scan.dt, start, steps, scan.rank, dt_low);
    }
    void read_chunk(const VideoMambaSequence& sequence, int64_t start, int steps, int64_t width, float* target) const {
        const auto source = rows(sequence, start);
        for_groups(width, [&](int64_t n, auto count) {
            float* group = of_group(target, n);
            for (int i = 0; i < steps; ++i) store(group + i * count, load(source[i] + n, count), count);
            std::fill(group + steps * count, group + kChunk * count, 0.0f);  // steps that the chunk lacks
        });
    }

    // Time steps of a chunk for one block, before the softplus, from what `dt_proj` projects: a few steps for each time
    // that it is read.
    void project(int64_t block, Vector* dt) const {
        constexpr int kSteps = 8;
        const Vector* weight = dt_proj + block * scan.rank;
        for (int start = 0; start < kChunk; start += kSteps) {
            Vector sums[kSteps];
            for (int i = 0; i < kSteps; ++i) sums[i] = dt_bias[block];
            for_groups(scan.rank, [&](int64_t k, auto count) {
                const float* low = of_group(dt_low, k) + start * count;
                for (int j = 0; j < count; ++j)
                    for (int i = 0; i < kSteps; ++i) sums[i] += weight[k + j] * low[i * count + j];
            });
            for (int i = 0; i < kSteps; ++i) dt[start + i] = sums[i];
        }
    }

    // Whether no |dt * A| of a chunk can leave the range of the exponential.
    bool is_bounded(const Vector* dt, int64_t block) const {
        Vector largest{};
        for (int i = 0; i < kChunk; ++i) largest = maximum(largest, dt[i]);
        return all(largest * A_max[block] <= kExponents);
    }
};

// The recurrence over a chunk for kStates states of one block: y += C . h, with u = dt * x.
template <int kStates, bool kBounded>
void advance(const Vector* A, const float* B, const float* C, const Vector* dt, const Vector* u, Vector* h, Vector* y,
             Ahead& ahead) {
    Vector a[kStates], states[kStates];
    for (int n = 0; n < kStates; ++n) a[n] = A[n], states[n] = h[n];
    for (int i = 0; i < kChunk; ++i, B += kStates, C += kStates) {
        ahead.fetch();
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

template <class T>
class Forward {
  public:
    Forward(const VideoMambaScan& scan, int64_t sample, int64_t first, int64_t last)
        : scan_(scan),
          workspace_(Share<T, kGroup>::size(scan, last - first) + (last - first) * scan.state + 3 * kBlocks * kStride),
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
                look_ahead();
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
            for (int64_t block = begin_; block < end_; ++block) share_.project(block, dt_ + at(block, 0));
        const auto xs = share_.rows(scan_.x, start_), adds = share_.rows(scan_.add, start_);
        const auto dts = is_projected ? Rows<T>{} : share_.rows(scan_.dt, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(begin_, end_, [&](int64_t block, int64_t channel, int lanes) {
                const Vector x = load(xs[i] + channel, lanes), D = share_.D[block];
                Vector& dt = dt_[at(block, i)];
                dt = softplus(is_projected ? dt : load(dts[i] + channel, lanes) + share_.dt_bias[block]);
                u_[at(block, i)] = dt * x;
                y_[at(block, i)] = adds ? D * x + load(adds[i] + channel, lanes) : D * x;
            });
        // steps that leave the states alone
        for (int64_t block = begin_; block < end_; ++block)
            for (int i = steps_; i < kChunk; ++i) dt_[at(block, i)] = u_[at(block, i)] = Vector{};
    }

    // What is written after the recurrence, and what is read before the next one.
    void look_ahead() {
        ahead_.start((end_ - begin_) * share_.groups(scan_.state) * kChunk);
        share_.will_want_checkpoint(ahead_, start_, begin_, end_);
        for (const auto& sequence : {scan_.z, scan_.ungated, scan_.y})
            share_.will_want(ahead_, sequence, start_, begin_, end_);
        const bool is_last = end_ == share_.count;
        const int64_t start = is_last ? start_ + kChunk : start_, begin = is_last ? 0 : end_;
        if (start >= scan_.length) return;
        const int64_t end = std::min(share_.count, begin + kBlocks);
        for (const auto& sequence : {scan_.x, scan_.rank ? VideoMambaSequence{} : scan_.dt, scan_.add})
            share_.will_want(ahead_, sequence, start, begin, end);
    }

    void recur(int64_t block) {
        Vector* h = h_ + block * scan_.state;
        const Vector* dt = dt_ + at(block, 0);
        if (scan_.checkpoints) share_.write_states(share_.checkpoint(start_, block), h, block);
        const bool is_bounded = share_.is_bounded(dt, block);
        share_.for_groups(scan_.state, [&](int64_t n, auto states) {
            const auto run = is_bounded ? advance<states, true> : advance<states, false>;
            run(share_.A + block * scan_.state + n, share_.of_group(share_.B, n), share_.of_group(share_.C, n), dt,
                u_ + at(block, 0), h + n, y_ + at(block, 0), ahead_);
        });
    }

    void write() {
        const auto ys = share_.rows(scan_.y, start_), zs = share_.rows(scan_.z, start_);
        const auto ungated = share_.rows(scan_.ungated, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(begin_, end_, [&](int64_t block, int64_t channel, int lanes) {
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
    Share<T, kGroup> share_;
    Vector *h_, *dt_, *u_, *y_;  // [block][state], [block][step] of the blocks from begin_ to end_
    Ahead ahead_;
    int64_t start_ = 0, begin_ = 0, end_ = 0;
    int steps_ = 0;
};

// What the adjoint of a chunk needs for one block, [step] each.
struct Adjoint {
    Vector x[kChunk], dt[kChunk], dt_slope[kChunk], u[kChunk], grad_y[kChunk];
    Vector grad_u[kChunk], grad_dt[kChunk];
    bool is_bounded;
    Vector distance;  // between blocks, for the same reason, and so that they don't compete for lines of the first cache

    // A step that leaves everything alone.
    void clear(int i) { dt[i] = u[i] = grad_y[i] = grad_u[i] = grad_dt[i] = Vector{}; }
};

// The states of a chunk anew, then the adjoint recurrence g_t = C_t * grad_y_t + exp(dt_{t+1} * A) * g_{t+1}, for
// kStates states of one block. `carry` is exp(dt * A) * g of the step after the chunk, `grad_B` and `grad_C` are
// [step][kStates] sums over blocks.
template <int kStates, bool kBounded>
void retreat(const Vector* A, const float* B, const float* C, const Vector* before, Adjoint& block, Vector* carry,
             Vector* grad_A, Vector* grad_B, Vector* grad_C, Ahead& ahead) {
    Vector a[kStates], h[kStates], states[kChunk][kStates], decays[kChunk][kStates];
    for (int n = 0; n < kStates; ++n) a[n] = A[n], h[n] = before[n];
    for (int i = 0; i < kChunk; ++i) {
        ahead.fetch();
        const Vector dt = block.dt[i], u = block.u[i], grad_y = block.grad_y[i];
        for (int n = 0; n < kStates; ++n) {
            states[i][n] = h[n];
            decays[i][n] = decay<kBounded>(dt, a[n]);
            h[n] = decays[i][n] * h[n] + u * B[i * kStates + n];
            grad_C[i * kStates + n] += grad_y * h[n];
        }
    }
    Vector g[kStates], sum_A[kStates];
    for (int n = 0; n < kStates; ++n) g[n] = carry[n], sum_A[n] = grad_A[n];
    for (int i = kChunk - 1; i >= 0; --i) {
        ahead.fetch();
        const Vector grad_y = block.grad_y[i], dt = block.dt[i], u = block.u[i];
        Vector grad_u = block.grad_u[i], grad_dt = block.grad_dt[i];
        for (int n = 0; n < kStates; ++n) {
            g[n] += grad_y * C[i * kStates + n];
            grad_B[i * kStates + n] += u * g[n];
            grad_u += g[n] * B[i * kStates + n];
            g[n] *= decays[i][n];
            const Vector grad_exponent = g[n] * states[i][n];
            grad_dt += grad_exponent * a[n];
            sum_A[n] += grad_exponent * dt;
        }
        block.grad_u[i] = grad_u, block.grad_dt[i] = grad_dt;
    }
    for (int n = 0; n < kStates; ++n) carry[n] = g[n], grad_A[n] = sum_A[n];
}

// From the time steps before the softplus to what `dt_proj` made them of, for kRanks ranks of one block: `grad_low` is
// [step][kRanks] sums over blocks.
template <int kRanks>
void project_back(const Vector* grad_dt, const Vector* weight, const float* low, Vector* grad_weight, Vector* grad_low) {
    Vector w[kRanks], sum_w[kRanks];
    for (int k = 0; k < kRanks; ++k) w[k] = weight[k], sum_w[k] = grad_weight[k];
    for (int i = 0; i < kChunk; ++i) {
        const Vector grad = grad_dt[i];
        for (int k = 0; k < kRanks; ++k) {
            grad_low[i * kRanks + k] += grad * w[k];
            sum_w[k] += grad * low[i * kRanks + k];
        }
    }
    for (int k = 0; k < kRanks; ++k) grad_weight[k] = sum_w[k];
}

// The gradient of what `x_proj` makes, (batch, length, width), which is a sum over channels. Threads that share a sample
// have rows of their own, the first of them those of the gradient, to which the others are added.
class ProjectedGradient {
  public:
    ProjectedGradient(const VideoMambaScan& scan, float* gradient, int64_t blocks, int64_t parts)
        : width(scan.rank + 2 * scan.state), scan_(scan), gradient_(gradient), blocks_(blocks), parts_(parts) {
        int64_t most = 0;
        for (int64_t sample = 0; sample < scan.batch; ++sample) most = std::max(most, last_part(sample) - first_part(sample));
        others_.reset(new float[most * scan.batch * scan.length * width]);
    }

    const int64_t width;

    // Of the rows of a sample, for the part that works on it.
    float* rows(int64_t sample, int64_t part) const {
        const int64_t index = part - first_part(sample), offset = sample * scan_.length * width;
        return index == 0 ? gradient_ + offset : others_.get() + (index - 1) * scan_.batch * scan_.length * width + offset;
    }

    void add_up() const {
        const int64_t parts = std::min(parts_, scan_.length);
        parallel(parts, [&](int64_t share) {
            for_share(scan_.batch, scan_.length, share, parts, [&](int64_t sample, int64_t first, int64_t last) {
                for (int64_t part = first_part(sample) + 1; part <= last_part(sample); ++part)
                    for (int64_t i = first * width; i < last * width; ++i)
                        rows(sample, first_part(sample))[i] += rows(sample, part)[i];
            });
        });
    }

  private:
    int64_t first_part(int64_t sample) const { return part_of(sample * blocks_, scan_.batch * blocks_, parts_); }
    int64_t last_part(int64_t sample) const { return part_of((sample + 1) * blocks_ - 1, scan_.batch * blocks_, parts_); }

    const VideoMambaScan& scan_;
    float* const gradient_;
    const int64_t blocks_, parts_;
    std::unique_ptr<float[]> others_;
};

template <class T>
class Backward {
  public:
    Backward(const VideoMambaScan& scan, const VideoMambaScanGradients& gradients, int64_t sample, int64_t first,
             int64_t last, float* projected, int64_t projected_width)
        : scan_(scan),
          gradients_(gradients),
          projected_(projected),
          projected_width_(projected_width),
          workspace_(Share<T, kBackwardGroup>::size(scan, last - first) + (last - first) * (2 * scan.state + scan.rank + 2) +
                     2 * kChunk * kBackwardGroup + kDistance),
          share_(scan, sample, first, last, workspace_),
          adjoints_(std::min<int64_t>(kBlocks, last - first)) {
        carry_ = workspace_.take(share_.count * scan.state);
        grad_A_ = workspace_.take(share_.count * scan.state);
        grad_D_ = workspace_.take(share_.count);
        grad_dt_bias_ = workspace_.take(share_.count);
        grad_dt_proj_ = workspace_.take(share_.count * scan.rank);
        sums_ = workspace_.take(kChunk * kBackwardGroup + kDistance);
        more_sums_ = workspace_.take(kChunk * kBackwardGroup);
        if (gradients.conv_weight) make_convolution(first, last);
    }

    // The gradients of A, dt_proj, D and dt_bias go into `sums`.
    void run(SumsOfSamples& sums) {
        const int64_t chunks = (scan_.length + kChunk - 1) / kChunk;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            start_ = chunk * kChunk;
            steps_ = static_cast<int>(std::min<int64_t>(kChunk, scan_.length - start_));
            share_.read_chunk(start_, steps_);
            for (int64_t first = 0; first < share_.count; first += kBlocks) {
                const int64_t last = std::min(share_.count, first + kBlocks);
                prepare(first, last);
                look_ahead(first, last);
                share_.for_groups(scan_.state, [&](int64_t n, auto states) { adjoint<states>(n, first, last); });
                finish(first, last);
                share_.for_groups(scan_.rank, [&](int64_t k, auto ranks) { project_back<ranks>(k, first, last); });
            }
        }
        for (int64_t block = 0; block < share_.count; ++block) {
            const auto set = [&](int64_t index, Vector value) {
                sums.set(share_.sample, index, share_.channel(block), value);
            };
            for (int64_t n = 0; n < scan_.state; ++n) set(n, grad_A_[block * scan_.state + n]);
            for (int64_t k = 0; k < scan_.rank; ++k) set(scan_.state + k, grad_dt_proj_[block * scan_.rank + k]);
            set(scan_.state + scan_.rank, grad_D_[block]);
            set(scan_.state + scan_.rank + 1, grad_dt_bias_[block]);
        }
    }

  private:
    void make_convolution(int64_t first, int64_t last) {
        const VideoMambaConvolution convolution{
            .batch = scan_.batch, .length = scan_.length, .channels = scan_.channels, .width = gradients_.conv_width,
            .reverse = scan_.reverse, .x = scan_.x, .weight = gradients_.conv_weight, .bias = gradients_.conv_bias};
        convolution_.emplace(convolution, first, last);
        taps_.resize(convolution.width);
    }

    template <int kWidth>
    void convolve(int64_t first, int64_t last) {
        for (int i = 0; i < steps_; ++i) {
            convolution_->inputs(share_.sample, share_.position(start_ + i), taps_.data());
            share_.for_blocks(first, last, [&](int64_t block, int64_t, int lanes) {
                adjoints_[block - first].x[i] = convolution_->template output<kWidth>(taps_.data(), block, lanes);
            });
        }
    }

    void read_x(int64_t first, int64_t last) {
        if (convolution_) return with_width(gradients_.conv_width, [&](auto width) { convolve<width>(first, last); });
        const auto xs = share_.rows(scan_.x, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(first, last, [&](int64_t block, int64_t channel, int lanes) {
                adjoints_[block - first].x[i] = load(xs[i] + channel, lanes);
            });
    }

    // Through the gate, and the time steps.
    void prepare(int64_t first, int64_t last) {
        read_x(first, last);
        const bool is_projected = scan_.rank;
        if (is_projected)
            for (int64_t block = first; block < last; ++block) share_.project(block, adjoints_[block - first].dt);
        const auto dts = is_projected ? Rows<T>{} : share_.rows(scan_.dt, start_);
        const auto zs = share_.rows(scan_.z, start_), ungated = share_.rows(scan_.ungated, start_);
        const auto grad_ys = share_.rows(gradients_.y, start_), grad_zs = share_.rows(gradients_.z, start_);
        const auto grad_adds = share_.rows(gradients_.add, start_), ys = share_.rows(scan_.y, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(first, last, [&](int64_t block, int64_t channel, int lanes) {
                Adjoint& adjoint = adjoints_[block - first];
                Vector grad_y = load(grad_ys[i] + channel, lanes);
                if (zs) {
                    const Vector z = load(zs[i] + channel, lanes), gate = sigmoid(z);
                    const Vector y = load(ungated[i] + channel, lanes);
                    // in this order no product exceeds float32 where the gradient does not
                    store(grad_zs[i] + channel, grad_y * (y * (gate * (1.0f + z * (1.0f - gate)))), lanes);
                    if (ys) store(ys[i] + channel, y * (z * gate), lanes);
                    grad_y *= z * gate;
                    store(grad_adds[i] + channel, grad_y, lanes);
                }
                const Vector dt = is_projected ? adjoint.dt[i] : load(dts[i] + channel, lanes) + share_.dt_bias[block];
                adjoint.dt[i] = softplus(dt, &adjoint.dt_slope[i]);
                adjoint.u[i] = adjoint.dt[i] * adjoint.x[i];
                adjoint.grad_y[i] = grad_y;
                adjoint.grad_u[i] = adjoint.grad_dt[i] = Vector{};
            });
        for (int64_t block = first; block < last; ++block) {
            Adjoint& adjoint = adjoints_[block - first];
            for (int i = steps_; i < kChunk; ++i) adjoint.clear(i);
            adjoint.is_bounded = share_.is_bounded(adjoint.dt, block);
        }
    }

    // What is written after the adjoint of a chunk, and what is wanted for the next one.
    void look_ahead(int64_t first, int64_t last) {
        ahead_.start(2 * (last - first) * share_.groups(scan_.state) * kChunk);
        const auto dt = scan_.rank ? VideoMambaSequence{} : scan_.dt;
        for (const auto& sequence : {gradients_.x, gradients_.dt})
            share_.will_want(ahead_, sequence, start_, first, last);
        const bool is_last = last == share_.count;
        const int64_t start = is_last ? start_ - kChunk : start_, begin = is_last ? 0 : last;
        if (start < 0) return;
        const int64_t end = std::min(share_.count, begin + kBlocks);
        for (const auto& sequence :
             {scan_.x, dt, gradients_.y, scan_.z, scan_.ungated, scan_.y, gradients_.z, gradients_.add})
            share_.will_want(ahead_, sequence, start, begin, end);
        share_.will_want_checkpoint(ahead_, start, begin, end);
    }

    template <int kStates>
    void adjoint(int64_t n, int64_t first, int64_t last) {
        std::fill_n(sums_, kChunk * kStates, Vector{});
        std::fill_n(more_sums_, kChunk * kStates, Vector{});
        for (int64_t block = first; block < last; ++block) {
            Adjoint& adjoint = adjoints_[block - first];
            const auto run = adjoint.is_bounded ? retreat<kStates, true> : retreat<kStates, false>;
            const int64_t offset = block * scan_.state + n;
            Vector before[kStates];
            for (int j = 0; j < kStates; ++j)
                before[j] = load(share_.checkpoint(start_, block) + (n + j) * scan_.channels, share_.lanes(block));
            run(share_.A + offset, share_.of_group(share_.B, n), share_.of_group(share_.C, n), before, adjoint,
                carry_ + offset, grad_A_ + offset, sums_, more_sums_, ahead_);
        }
        add_sums<kStates>(sums_, scan_.rank + n, first == 0);
        add_sums<kStates>(more_sums_, scan_.rank + scan_.state + n, first == 0);
    }

    template <int kRanks>
    void project_back(int64_t k, int64_t first, int64_t last) {
        std::fill_n(sums_, kChunk * kRanks, Vector{});
        for (int64_t block = first; block < last; ++block) {
            const int64_t offset = block * scan_.rank + k;
            videomamba::project_back<kRanks>(adjoints_[block - first].grad_dt, share_.dt_proj + offset,
                                             share_.of_group(share_.dt_low, k), grad_dt_proj_ + offset, sums_);
        }
        add_sums<kRanks>(sums_, k, first == 0);
    }

    // Adds the sums over channels of [step][kWidth], which are overwritten, to some entries of the rows of these steps,
    // or writes them there if they are the first ones.
    template <int kWidth>
    void add_sums(Vector* values, int64_t entry, bool is_first) {
        float sums_of_chunk[kChunk * kWidth];
        for (int i = 0; i < kChunk * kWidth; i += kLanes) store(sums_of_chunk + i, sums(values + i));
        for (int i = 0; i < steps_; ++i) {
            float* row = projected_ + share_.position(start_ + i) * projected_width_ + entry;
            for (int j = 0; j < kWidth; ++j) row[j] = (is_first ? 0 : row[j]) + sums_of_chunk[i * kWidth + j];
        }
    }

    // From u = dt * x and exp(dt * A) to x and dt, before bias and softplus.
    void finish(int64_t first, int64_t last) {
        const auto grad_xs = share_.rows(gradients_.x, start_);
        const auto grad_dts = share_.rows(gradients_.dt, start_);
        for (int i = 0; i < steps_; ++i)
            share_.for_blocks(first, last, [&](int64_t block, int64_t channel, int lanes) {
                Adjoint& adjoint = adjoints_[block - first];
                const Vector x = adjoint.x[i], grad_y = adjoint.grad_y[i];
                const Vector grad_dt = (adjoint.grad_dt[i] * kLn2 + adjoint.grad_u[i] * x) * adjoint.dt_slope[i];
                const Vector grad_x = adjoint.grad_u[i] * adjoint.dt[i] + grad_y * share_.D[block];
                store(grad_xs[i] + channel, grad_x, lanes);
                if (grad_dts)
                    store(grad_dts[i] + channel, grad_dt, lanes);
                else
                    adjoint.grad_dt[i] = grad_dt;
                grad_D_[block] += grad_y * x;
                grad_dt_bias_[block] += grad_dt;
            });
    }

    const VideoMambaScan& scan_;
    const VideoMambaScanGradients& gradients_;
    float* const projected_;  // rows of gradients of dt_low, B and C
    const int64_t projected_width_;
    Workspace workspace_;
    Share<T, kBackwardGroup> share_;
    std::vector<Adjoint> adjoints_;
    Vector *carry_, *grad_A_, *grad_D_, *grad_dt_bias_, *grad_dt_proj_;
    std::optional<Convolution<T>> convolution_;  // that makes the x of the scan
    std::vector<const T*> taps_;                 // the rows that it sees
    Vector *sums_, *more_sums_;  // over channels, [step][states or ranks of a group]
    Ahead ahead_;
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
    const int64_t blocks = vectors(scan.channels), parts = std::min(scan.threads, scan.batch * blocks);
    const ProjectedGradient projected(scan, gradients.projected, blocks, parts);
    SumsOfSamples sums(scan.batch, scan.state + scan.rank + 2, scan.channels);
    parallel(parts, [&](int64_t part) {
        for_share(scan.batch, blocks, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            float* rows = projected.rows(sample, part);
            Backward<T>(scan, gradients, sample, first, last, rows, projected.width).run(sums);
        });
    });
    projected.add_up();
    sums.add_up(0, scan.state, gradients.A);
    sums.add_up(scan.state, scan.rank, gradients.dt_proj);
    sums.add_up(scan.state + scan.rank, 1, gradients.D);
    sums.add_up(scan.state + scan.rank + 1, 1, gradients.dt_bias);
}

}  // namespace
}  // namespace videomamba

using namespace videomamba;

extern "C" __attribute__((visibility("default"))) int64_t videomamba_version() { return kVersion; }

extern "C" __attribute__((visibility("default"))) void videomamba_selective_scan(const VideoMambaScan* scan) {
    switch (scan->dtype) {
        case kFloat32: return forward_all<float>(*scan);
        case kBFloat16: return forward_all<BFloat16>(*scan);
    }
}

extern "C" __attribute__((visibility("default"))) void videomamba_selective_scan_backward(
    const VideoMambaScan* scan, const VideoMambaScanGradients* gradients) {
    switch (scan->dtype) {
        case kFloat32: return backward_all<float>(*scan, *gradients);
        case kBFloat16: return backward_all<BFloat16>(*scan, *gradients);
    }
}
