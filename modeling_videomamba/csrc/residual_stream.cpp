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

// Calls `function(sample, t)` for all rows, on several threads.
template <class Call, class Function>
void for_rows(const Call& call, const Function& function) {
    const int64_t parts = std::min(call.threads, call.batch * call.length);
    parallel(parts, [&](int64_t part) {
        for_share(call.batch, call.length, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) function(sample, t);
        });
    });
}

template <class T>
void normalise(const VideoMambaNorm& norm) {
    for_rows(norm, [&](int64_t sample, int64_t t) {
        const float* x = row<float>(norm.x, sample, t);
        T* y = row<T>(norm.y, sample, t);
        Vector squares{};
        for_vectors(norm.width, [&](int64_t channel, int lanes) {
            const Vector value = load(x + channel, lanes);
            squares += value * value;
        });
        const float scale = 1.0f / std::sqrt(sum(squares) / norm.width + norm.eps);
        for_vectors(norm.width, [&](int64_t channel, int lanes) {
            store(y + channel, load(x + channel, lanes) * scale * load(norm.weight + channel, lanes), lanes);
        });
    });
}

template <class T>
void add(const VideoMambaSum& sum) {
    for_rows(sum, [&](int64_t sample, int64_t t) {
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

extern "C" __attribute__((visibility("default"))) void videomamba_sum(const VideoMambaSum* sum) {
    switch (sum->dtype) {
        case kFloat32: return add<float>(*sum);
        case kBFloat16: return add<BFloat16>(*sum);
        case kFloat16: return add<Half>(*sum);
    }
}
