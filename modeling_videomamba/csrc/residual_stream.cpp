// What happens to the residual stream, which is float32, on a CPU: the RMS norm in front of the mixer, which reads each
// row once, and the sum with the output of the mixer.

#include <cmath>

#include "parallel.h"
#include "workspace.h"

namespace videomamba {
namespace {

// Calls `function(channel, lanes)` for the vectors of a row, compiled for full ones and for others.
template <class Function>
void for_vectors(int64_t width, const Function& function) {
    int64_t channel = 0;
    for (; channel + kLanes <= width; channel += kLanes) function(channel, kLanes);
    if (channel < width) function(channel, lanes_at(channel, width));
}

// Calls `function(part, sample, t)` for all rows, on several threads.
template <class Call, class Function>
void for_rows(const Call& call, const Function& function) {
    const int64_t parts = std::min(call.threads, call.batch * call.length);
    parallel(parts, [&](int64_t part) {
        for_share(call.batch, call.length, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) function(part, sample, t);
        });
    });
}

// 1 / rms(x), as a product: `before` is 1 unless the squares exceed float32.
struct InverseRms {
    float before, after;

    InverseRms(const VideoMambaNorm& norm, const float* x) : before(1.0f), after(of_scaled(norm, x)) {
        if (after == 0.0f) before = 0x1p-80f, after = of_scaled(norm, x);
    }
    Vector operator*(Vector x) const { return x * before * after; }

  private:
    float of_scaled(const VideoMambaNorm& norm, const float* x) const {
        Vector squares{};
        for_vectors(norm.width, [&](int64_t channel, int lanes) {
            const Vector value = load(x + channel, lanes) * before;
            squares += value * value;
        });
        return 1.0f / std::sqrt(sum(squares) / norm.width + norm.eps * before * before);
    }
};

template <class T>
void normalise(const VideoMambaNorm& norm) {
    for_rows(norm, [&](int64_t, int64_t sample, int64_t t) {
        const float* x = row<float>(norm.x, sample, t);
        T* y = row<T>(norm.y, sample, t);
        const InverseRms inverse_rms(norm, x);
        for_vectors(norm.width, [&](int64_t channel, int lanes) {
            store(y + channel, inverse_rms * load(x + channel, lanes) * load(norm.weight + channel, lanes), lanes);
        });
    });
}

// With s = 1 / rms(x): grad_x = s (grad_y weight - x s^2 mean(grad_y weight x)), grad_weight = sum over rows of grad_y x s.
template <class T>
void normalise_backward(const VideoMambaNorm& norm, const VideoMambaNormGradients& gradients) {
    for_rows(norm, [&](int64_t part, int64_t sample, int64_t t) {
        const float* x = row<float>(norm.x, sample, t);
        const T* grad_y = row<T>(gradients.y, sample, t);
        const float* add = gradients.add.data ? row<float>(gradients.add, sample, t) : nullptr;
        float *grad_x = row<float>(gradients.x, sample, t), *grad_weight = gradients.weight + part * norm.width;
        const InverseRms inverse_rms(norm, x);
        Vector products{};
        for_vectors(norm.width, [&](int64_t channel, int lanes) {
            const Vector normed = inverse_rms * load(x + channel, lanes), grad = load(grad_y + channel, lanes);
            products += grad * load(norm.weight + channel, lanes) * normed;
            store(grad_weight + channel, load(grad_weight + channel, lanes) + grad * normed, lanes);
        });
        const float mean = sum(products) / norm.width;
        for_vectors(norm.width, [&](int64_t channel, int lanes) {
            const Vector normed = inverse_rms * load(x + channel, lanes);
            const Vector grad = load(grad_y + channel, lanes) * load(norm.weight + channel, lanes);
            const Vector total = inverse_rms * (grad - normed * mean);
            store(grad_x + channel, add ? total + load(add + channel, lanes) : total, lanes);
        });
    });
}

template <class T>
void add(const VideoMambaSum& sum) {
    for_rows(sum, [&](int64_t, int64_t sample, int64_t t) {
        const float* x = row<float>(sum.x, sample, t);
        const T* z = row<T>(sum.z, sample, t);
        float* y = row<float>(sum.y, sample, t);
        for_vectors(sum.width, [&](int64_t channel, int lanes) {
            store(y + channel, load(x + channel, lanes) + load(z + channel, lanes), lanes);
        });
    });
}

}  // namespace
}  // namespace videomamba

using namespace videomamba;

extern "C" __attribute__((visibility("default"))) void videomamba_rms_norm(const VideoMambaNorm* norm) {
    switch (norm->dtype) {
        case kFloat32: return normalise<float>(*norm);
        case kBFloat16: return normalise<BFloat16>(*norm);
        case kFloat16: return normalise<Half>(*norm);
    }
}

extern "C" __attribute__((visibility("default"))) void videomamba_rms_norm_backward(
    const VideoMambaNorm* norm, const VideoMambaNormGradients* gradients) {
    switch (norm->dtype) {
        case kFloat32: return normalise_backward<float>(*norm, *gradients);
        case kBFloat16: return normalise_backward<BFloat16>(*norm, *gradients);
        case kFloat16: return normalise_backward<Half>(*norm, *gradients);
    }
}

extern "C" __attribute__((visibility("default"))) void videomamba_sum(const VideoMambaSum* sum) {
    switch (sum->dtype) {
        case kFloat32: return add<float>(*sum);
        case kBFloat16: return add<BFloat16>(*sum);
        case kFloat16: return add<Half>(*sum);
    }
}
