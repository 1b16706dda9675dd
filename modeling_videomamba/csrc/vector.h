// Vectors of float32 in the vector extensions of GCC and Clang: one source for SSE2, AVX2, AVX-512 and NEON. The flags
// of the compiler choose the width.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace videomamba {

#if defined(__AVX512F__)
#define VIDEOMAMBA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VIDEOMAMBA_VECTOR_BYTES 32
#else
#define VIDEOMAMBA_VECTOR_BYTES 16
#endif

constexpr int kLanes = VIDEOMAMBA_VECTOR_BYTES / 4;

using Vector [[gnu::vector_size(VIDEOMAMBA_VECTOR_BYTES)]] = float;
using Integers [[gnu::vector_size(VIDEOMAMBA_VECTOR_BYTES)]] = int32_t;
using Bits [[gnu::vector_size(VIDEOMAMBA_VECTOR_BYTES)]] = uint32_t;
using HalfBits [[gnu::vector_size(VIDEOMAMBA_VECTOR_BYTES / 2)]] = uint16_t;

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

constexpr float kLargest = std::numeric_limits<float>::max(), kNaN = std::numeric_limits<float>::quiet_NaN();

inline Vector broadcast(float value) { return Vector{} + value; }
// Of a NaN and a bound, the NaN.
#if VIDEOMAMBA_VECTOR_BYTES == 64
inline Vector at_most(Vector v, float bound) { return (Vector)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)v); }
inline Vector at_least(Vector v, float bound) { return (Vector)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)v); }
#else
inline Vector at_most(Vector v, float bound) { return bound < v ? broadcast(bound) : v; }
inline Vector at_least(Vector v, float bound) { return bound > v ? broadcast(bound) : v; }
#endif
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
inline bool all(Integers mask) {
    int32_t lanes[kLanes], every = -1;
    std::memcpy(lanes, &mask, sizeof mask);
    for (int lane : lanes) every &= lane;
    return every;
}
inline Vector absolute(Vector a) { return (Vector)((Bits)a & 0x7fffffffu); }

// Conversions. Those of float16 work on its bits, because not every compiler knows the type.

inline Vector widen(HalfBits halves, BFloat16) { return (Vector)(__builtin_convertvector(halves, Bits) << 16); }

inline HalfBits narrow(Vector value, BFloat16) {
    const Bits bits = (Bits)value;
    const Bits nearest_even = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
    const Bits quiet_nan = (bits >> 16) | 0x40u;
    return __builtin_convertvector(value == value ? nearest_even : quiet_nan, HalfBits);
}

inline Vector widen(HalfBits halves, Half) {
    const Bits bits = __builtin_convertvector(halves, Bits);
    const Bits sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    const Bits normal = (magnitude << 13) + (112u << 23);  // from the bias of one exponent to that of the other
    const Bits denormal = (Bits)(__builtin_convertvector((Integers)magnitude, Vector) * 0x1p-24f);
    const Bits infinite_or_nan = (magnitude << 13) | 0x7f800000u;
    const Bits finite = magnitude < 0x400u ? denormal : normal;
    return (Vector)((magnitude >= 0x7c00u ? infinite_or_nan : finite) | sign);
}

inline HalfBits narrow(Vector value, Half) {
    const Bits bits = (Bits)value, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Bits rebiased = magnitude - (112u << 23);
    const Bits normal = (rebiased + (0xfffu + ((rebiased >> 13) & 1u))) >> 13;
    // adding 0.5 leaves the bits of a denormal float16 at the end of the mantissa, rounded to the nearest even
    const Bits denormal = (Bits)((Vector)magnitude + 0.5f) - 0x3f000000u;
    const Bits overflow = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
    const Bits finite = magnitude < (113u << 23) ? denormal : normal;
    return __builtin_convertvector((magnitude >= 0x477ff000u ? overflow : finite) | sign, HalfBits);
}

// Reads and writes of the first `lanes` entries of a vector; the other entries are zero.

template <class T>
inline Vector load(const T* source, int lanes = kLanes) {
    using Stored = std::conditional_t<std::is_same_v<T, float>, Vector, HalfBits>;
    Stored stored{};
    if (lanes == kLanes)
        std::memcpy(&stored, source, sizeof stored);
    else
        std::memcpy(&stored, source, lanes * sizeof(T));
    if constexpr (std::is_same_v<T, float>)
        return stored;
    else
        return widen(stored, T{});
}

template <class T>
inline float number(T value) {
    return load(&value, 1)[0];
}

template <class T>
inline void store(T* target, Vector value, int lanes = kLanes) {
    const auto write = [&](auto stored) {
        if (lanes == kLanes)
            std::memcpy(target, &stored, sizeof stored);
        else
            std::memcpy(target, &stored, lanes * sizeof(T));
    };
    if constexpr (std::is_same_v<T, float>)
        write(value);
    else
        write(narrow(value, T{}));
}

inline float sum(const Vector& value) {
    float lanes[kLanes], total = 0;
    std::memcpy(lanes, &value, sizeof value);
    for (int width = kLanes / 2; width >= 4; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    for (int i = 0; i < 4; ++i) total += lanes[i];
    return total;
}

template <int... kLane>
inline Integers lane_numbers(std::integer_sequence<int, kLane...>) {
    return Integers{kLane...};
}
template <int kWidth, int... kLane>
inline Vector swap(Vector v, std::integer_sequence<int, kLane...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(v, v, (kLane ^ kWidth)...);
#else
    return __builtin_shuffle(v, Integers{(kLane ^ kWidth)...});
#endif
}
// Neighbouring groups of kWidth lanes in each other's place.
template <int kWidth>
inline Vector swap(Vector v) {
    return swap<kWidth>(v, std::make_integer_sequence<int, kLanes>());
}

// Lane i of the result is the sum of the lanes of values[i], which are overwritten.
template <int kWidth = kLanes / 2>
inline Vector sums(Vector* values) {
    if constexpr (kWidth == 0) {
        return values[0];
    } else {
        const Integers lane = lane_numbers(std::make_integer_sequence<int, kLanes>());
        const auto is_second = (lane & kWidth) != 0;
        for (int i = 0; i < kWidth; ++i) {
            const Vector first = values[i], second = values[i + kWidth];
            values[i] = (is_second ? second : first) + swap<kWidth>(is_second ? first : second);
        }
        return sums<kWidth / 2>(values);
    }
}

// Functions.

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kExponents = 126;  // 2^v is a normal float for |v| up to here

// 2^v for |v| <= kExponents, within 2e-7 relative. 2^0 is exactly 1: decays close to 1 are applied thousands of times.
#if VIDEOMAMBA_VECTOR_BYTES == 64
// Two registers hold 2^(n / 32), so that a polynomial of degree 2 is left.
inline Vector exp2_bounded(Vector v) {
    constexpr Vector kFirst = {0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f,
                               0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f,
                               0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f,
                               0x1.6247ecp+0f};
    constexpr Vector kLast = {0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
                              0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f,
                              0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f,
                              0x1.f50766p+0f};
    const Vector shifted = v + 0x1.8p18f;  // its last bits are the nearest multiple of 1 / 32
    const Vector nearest = shifted - 0x1.8p18f, f = v - nearest;
    Vector p = broadcast(0.24022676050662994f);
    p = p * f + 0.6931573152542114f;
    p = p * f + 1.0f;
    const __m512 power = _mm512_permutex2var_ps((__m512)kFirst, (__m512i)shifted, (__m512)kLast);
    return (Vector)_mm512_scalef_ps((__m512)(p * (Vector)power), (__m512)nearest);  // times 2^floor(nearest)
}
#else
inline Vector exp2_bounded(Vector v) {
    const Vector shifted = v + 0x1.8p23f;  // its last bits are the nearest integer
    const Vector f = v - (shifted - 0x1.8p23f);
    Vector p = broadcast(0.001326472731307149f);
    p = p * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
    p = p * f + 1.0f;
    return (Vector)((Bits)p + ((Bits)shifted << 23));  // unsigned, because the sum wraps where v is NaN
}
#endif

inline Vector bounded(Vector v) { return at_most(at_least(v, -kExponents), kExponents); }

// 2^v for any v: zero below 2^-kExponents, because 2^-kExponents times a large number is not small, and at most
// 2^kExponents.
inline Vector exp2(Vector v) {
    const Vector power = exp2_bounded(bounded(v));
    return v < -kExponents ? Vector{} : power;
}

// 1 / v for a normal v whose reciprocal is normal.
inline Vector reciprocal(Vector v) {
#if VIDEOMAMBA_VECTOR_BYTES == 64
    const Vector estimate = (Vector)_mm512_rcp14_ps((__m512)v);  // and one step of Newton's method, for a third of the time
    return estimate + estimate * (1.0f - v * estimate);
#else
    return 1.0f / v;
#endif
}

inline Vector sigmoid(Vector v) {
    const Vector exponent = v * -kLog2E;
    const Vector value = reciprocal(1.0f + exp2_bounded(bounded(exponent)));
    return exponent > kExponents ? Vector{} : value;  // so that v * sigmoid(v) goes to zero
}

// log(1 + w) for 0 <= w <= 1, within 1e-7 relative.
inline Vector log1p_unit(Vector w) {
    Vector p = broadcast(0.005232692696154118f);
    p = p * w - 0.029505232349038124f;
    p = p * w + 0.07822594046592712f;
    p = p * w - 0.13663244247436523f;
    p = p * w + 0.19106006622314453f;
    p = p * w - 0.2484298199415207f;
    p = p * w + 0.3331909775733948f;
    p = p * w - 0.4999949336051941f;
    p = p * w + 0.9999999403953552f;
    return p * w;
}

// log(1 + exp(v)), and its slope, the sigmoid.
inline Vector softplus(Vector v, Vector* slope = nullptr) {
    const Vector w = exp2(absolute(v) * -kLog2E);
    if (slope) *slope = (v < 0.0f ? w : broadcast(1.0f)) * reciprocal(1.0f + w);
    return at_least(v, 0.0f) + log1p_unit(w);
}

}  // namespace videomamba
