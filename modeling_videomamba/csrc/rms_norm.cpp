// The RMS norm in front of the mixer, on a CPU: each row is read once.

#include <cmath>

#include "parallel.h"
#include "workspace.h"

namespace videomamba {
namespace {

template <class T>
void normalise(const VideoMambaNorm& norm, int64_t sample, int64_t t) {
    const float* x = row<float>(norm.x, sample, t);
    T* y = row<T>(norm.y, sample, t);
    const int64_t full = norm.width / kLanes * kLanes;
    const int lanes = lanes_at(full, norm.width);
    Vector squares{}, last{};
    for (int64_t i = 0; i < full; i += kLanes) {
        const Vector value = load(x + i);
        squares += value * value;
    }
    if (lanes) last = load(x + full, lanes);
    const float scale = 1.0f / std::sqrt(sum(squares + last * last) / norm.width + norm.eps);
    for (int64_t i = 0; i < full; i += kLanes) store(y + i, load(x + i) * scale * load(norm.weight + i));
    if (lanes) store(y + full, last * scale * load(norm.weight + full, lanes), lanes);
}

template <class T>
void normalise_all(const VideoMambaNorm& norm) {
    const int64_t parts = std::min(norm.threads, norm.batch * norm.length);
    parallel(parts, [&](int64_t part) {
        for_share(norm.batch, norm.length, part, parts, [&](int64_t sample, int64_t first, int64_t last) {
            for (int64_t t = first; t < last; ++t) normalise<T>(norm, sample, t);
        });
    });
}

}  // namespace
}  // namespace videomamba

using namespace videomamba;

extern "C" __attribute__((visibility("default"))) void videomamba_rms_norm(const VideoMambaNorm* norm) {
    switch (norm->dtype) {
        case kFloat32: return normalise_all<float>(*norm);
        case kBFloat16: return normalise_all<BFloat16>(*norm);
        case kFloat16: return normalise_all<Half>(*norm);
    }
}
