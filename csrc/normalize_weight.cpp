// Weight normalisation by rows: w = g v / |v|, and its gradient. Rows have a few hundred columns: one row fits the
// first-level cache, so every array is read once from memory. bf16 results and gradients are allowed.

#include <cfloat>
#include <cmath>

#include "check.h"
#include "parallel.h"
#include "simd.h"

namespace {

FDK_INLINE float widen(float x) { return x; }
FDK_INLINE float widen(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

FDK_INLINE void narrow(float x, float& out) { out = x; }
FDK_INLINE void narrow(float x, uint16_t& out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t even = bits + 0x7fffu + ((bits >> 16) & 1u);  // round half to even
    out = static_cast<uint16_t>((x == x ? even : (bits | 0x400000u)) >> 16);
}

template <typename T>
FDK_INLINE float dot(const T* __restrict a, const float* __restrict b, int64_t n) {
    float lanes[32] = {};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; ++j) lanes[j] += widen(a[i + j]) * b[i + j];
    for (; i < n; ++i) lanes[i % 32] += widen(a[i]) * b[i];
    for (int width = 16; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    return lanes[0];
}

// |row|, or 0 where the squares in fp32 may have vanished or overflowed, which happens to no weight in use.
FDK_INLINE float quick_length(const float* row, int64_t d) {
    const float squares = dot(row, row, d);
    return squares > 1e-30f && squares <= FLT_MAX ? std::sqrt(squares) : 0;
}

double exact_length(const float* row, int64_t d) {
    double squares = 0;
    for (int64_t i = 0; i < d; ++i) squares += static_cast<double>(row[i]) * row[i];
    return std::sqrt(squares);
}

template <typename T>
void exact_backward_row(const T* grad, const float* row, float g, float* dv, float* dg, int64_t d) {
    const double norm = exact_length(row, d);
    double along = 0;
    for (int64_t i = 0; i < d; ++i) along += widen(grad[i]) * (row[i] / norm);
    for (int64_t i = 0; i < d; ++i) dv[i] = static_cast<float>(g / norm * (widen(grad[i]) - along * (row[i] / norm)));
    *dg = static_cast<float>(along);
}

template <typename T>
FDK_INLINE void forward_rows(const float* __restrict v, const float* __restrict g, T* __restrict out, int64_t begin, int64_t end,
                             int64_t d) {
    for (int64_t k = begin; k < end; ++k) {
        const float* row = v + k * d;
        const float length = quick_length(row, d);
        const float scale = g[k] / (length > 0 ? length : static_cast<float>(exact_length(row, d)));
        for (int64_t i = 0; i < d; ++i) narrow(scale * row[i], out[k * d + i]);
    }
}

// dv = g / |v| (dw - u (u . dw)) with u = v / |v|; dg = u . dw
template <typename T>
FDK_INLINE void backward_rows(const T* __restrict dw, const float* __restrict v, const float* __restrict g, float* __restrict dv,
                              float* __restrict dg, int64_t begin, int64_t end, int64_t d) {
    for (int64_t k = begin; k < end; ++k) {
        const float* row = v + k * d;
        const T* grad = dw + k * d;
        const float norm = quick_length(row, d), along = dot(grad, row, d);
        if (!(norm > 0)) {
            exact_backward_row(grad, row, g[k], dv + k * d, dg + k, d);
            continue;
        }
        const float scale = g[k] / norm, share = along / (norm * norm);
        for (int64_t i = 0; i < d; ++i) dv[k * d + i] = scale * (widen(grad[i]) - share * row[i]);
        dg[k] = along / norm;
    }
}

FDK_CLONES void forward_f32(const float* v, const float* g, float* out, int64_t begin, int64_t end, int64_t d) {
    forward_rows(v, g, out, begin, end, d);
}
FDK_CLONES void forward_bf16(const float* v, const float* g, uint16_t* out, int64_t begin, int64_t end, int64_t d) {
    forward_rows(v, g, out, begin, end, d);
}
FDK_CLONES void backward_f32(const float* dw, const float* v, const float* g, float* dv, float* dg, int64_t begin, int64_t end,
                             int64_t d) {
    backward_rows(dw, v, g, dv, dg, begin, end, d);
}
FDK_CLONES void backward_bf16(const uint16_t* dw, const float* v, const float* g, float* dv, float* dg, int64_t begin, int64_t end,
                              int64_t d) {
    backward_rows(dw, v, g, dv, dg, begin, end, d);
}

}  // namespace

extern "C" {

// v [k, d], g [k] fp32 -> out [k, d], fp32 or (bf16 = 1) bf16.
int fdk_normalize_weight(const float* v, const float* g, void* out, int64_t k, int64_t d, int bf16, int num_threads) {
    if (!fdk::fits({k, d}) || !fdk::given(k > 0, g) || !fdk::given(k * d > 0, v, out) || !fdk::is_flag(bf16)) return 1;
    return fdk::guarded([&] {
        fdk::parallel_for(k, num_threads, [&](int64_t begin, int64_t end) {
            if (bf16)
                forward_bf16(v, g, static_cast<uint16_t*>(out), begin, end, d);
            else
                forward_f32(v, g, static_cast<float*>(out), begin, end, d);
        });
    });
}

// dw [k, d], fp32 or (bf16 = 1) bf16; v [k, d], g [k] -> dv [k, d], dg [k] fp32.
int fdk_normalize_weight_gradient(const void* dw, const float* v, const float* g, float* dv, float* dg, int64_t k, int64_t d,
                                  int bf16, int num_threads) {
    if (!fdk::fits({k, d}) || !fdk::given(k > 0, g, dg) || !fdk::given(k * d > 0, dw, v, dv) || !fdk::is_flag(bf16)) return 1;
    return fdk::guarded([&] {
        fdk::parallel_for(k, num_threads, [&](int64_t begin, int64_t end) {
            if (bf16)
                backward_bf16(static_cast<const uint16_t*>(dw), v, g, dv, dg, begin, end, d);
            else
                backward_f32(static_cast<const float*>(dw), v, g, dv, dg, begin, end, d);
        });
    });
}

}  // extern "C"
