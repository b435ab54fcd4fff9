// Loads, stores and exponentials of 16 lanes, for kernels over rows of fp32 or bfloat16 (uint16_t) numbers.
#pragma once

#include <cfloat>
#include <type_traits>

#include "simd.h"

namespace fdk {
namespace {

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
    static FDK_INLINE f32x16 load(const float* p) {
        f32x16 x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static FDK_INLINE void store(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
};

template <>
struct Lanes<uint16_t> {  // bfloat16
    static FDK_INLINE f32x16 load(const uint16_t* p) {
        u16x16 half;
        std::memcpy(&half, p, sizeof half);
        return reinterpret_cast<f32x16>(__builtin_convertvector(half, u32x16) << 16);
    }
    static FDK_INLINE void store(uint16_t* p, f32x16 x) {
        const u32x16 bits = reinterpret_cast<u32x16>(x);
        const u32x16 even = bits + 0x7fffu + ((bits >> 16) & 1u);  // round half to even
        const u32x16 rounded = x == x ? even : (bits | 0x400000u);  // NaN stays NaN
        const u16x16 half = __builtin_convertvector(rounded >> 16, u16x16);
        std::memcpy(p, &half, sizeof half);
    }
};

// Full vectors are loaded in place, the last one of a row through a zero-padded copy.
template <typename T>
FDK_INLINE f32x16 load(const T* p, int64_t left) {
    if (left >= 16) return Lanes<T>::load(p);
    T padded[16] = {};
    for (int64_t i = 0; i < left; ++i) padded[i] = p[i];
    return Lanes<T>::load(padded);
}

template <typename T>
FDK_INLINE void store(T* p, f32x16 x, int64_t left) {
    if (left >= 16) return Lanes<T>::store(p, x);
    T padded[16];
    Lanes<T>::store(padded, x);
    for (int64_t i = 0; i < left; ++i) p[i] = padded[i];
}

FDK_INLINE f32x16 where_valid(f32x16 x, f32x16 other, int64_t left) {
    constexpr i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return left >= 16 ? x : (lane < static_cast<int32_t>(left) ? x : other);
}

FDK_INLINE f32x16 fill(float x) { return x - f32x16{}; }

// f(k, left) for k = 0, 16, ... below count; `left` is the constant 16 but for the last vector of an odd row, so that the
// loop itself has no masks.
template <typename F>
FDK_INLINE void for_vectors(int64_t count, const F& f) {
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) f(k, std::integral_constant<int64_t, 16>());
    if (k < count) f(k, count - k);
}

#define FDK_LANES [&](int64_t k, auto left) __attribute__((always_inline))

// exp(x) for x <= 0, relative error below 2e-7; below -87.3 it is 0, and NaN stays NaN.
// 2^n with n = round(x / ln 2) from the float's exponent bits, times a polynomial on |r| <= ln 2 / 2.
FDK_INLINE f32x16 exp_negative(f32x16 x) {
    const f32x16 floor = fill(-87.3f);
    const f32x16 clamped = x < floor ? floor : x;
    const f32x16 shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
    const f32x16 n = shifted - 12582912.0f;
    const f32x16 r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    f32x16 poly = fill(1.0f / 720);
    poly = poly * r + 1.0f / 120;
    poly = poly * r + 1.0f / 24;
    poly = poly * r + 1.0f / 6;
    poly = poly * r + 0.5f;
    poly = poly * r + 1.0f;
    poly = poly * r + 1.0f;
    const i32x16 exponent = (reinterpret_cast<i32x16>(shifted) - 0x4b400000 + 127) << 23;
    const f32x16 result = poly * reinterpret_cast<f32x16>(exponent);
    return x < floor ? f32x16{} : result;
}

FDK_INLINE float horizontal_max(f32x16 x) {
    float m = x[0];
    for (int i = 1; i < 16; ++i) m = x[i] > m ? x[i] : m;
    return m;
}

FDK_INLINE float horizontal_sum(f32x16 x) {
    float lanes[16];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

}  // namespace
}  // namespace fdk
