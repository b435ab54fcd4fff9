// Colour jitter on planes, with the 8-bit results of Pillow and torchvision.
//
// Plain loops for the compiler to vectorise. The hue, which has too many selections for that, is in multicrop_hue.cpp.

#include "multicrop.h"

#include <algorithm>

#include "simd.h"

// A fused multiply-add would round once where the specification rounds twice.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace fdk::crop {
namespace {

constexpr int64_t kBlock = 256;

FDK_INLINE int luma_of(int r, int g, int b) { return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16; }

FDK_INLINE int blend(float base, float value, float factor) {
    const float mixed = base + factor * (value - base);
    return static_cast<int>(std::min(std::max(mixed, 0.0f), 255.0f));
}

FDK_CLONES void blend_bytes(uint8_t* __restrict p, int64_t count, float base, float factor) {
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(blend(base, p[i], factor));
}

void blend_constant(uint8_t* p, int64_t count, float base, float factor) {
    uint8_t table[256];
    for (int v = 0; v < 256; ++v) table[v] = static_cast<uint8_t>(blend(base, static_cast<float>(v), factor));
    if (!remap(p, count, table)) blend_bytes(p, count, base, factor);
}

FDK_CLONES int64_t luma_sum(const uint8_t* __restrict r, const uint8_t* __restrict g, const uint8_t* __restrict b,
                            int64_t count) {
    int64_t sum = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, count);
        int part = 0;
        for (int64_t i = begin; i < end; ++i) part += luma_of(r[i], g[i], b[i]);
        sum += part;
    }
    return sum;
}

FDK_CLONES void blend_luma(uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b, int64_t count,
                           float factor) {
    for (int64_t i = 0; i < count; ++i) {
        const float base = static_cast<float>(luma_of(r[i], g[i], b[i]));
        const int red = blend(base, r[i], factor), green = blend(base, g[i], factor), blue = blend(base, b[i], factor);
        r[i] = static_cast<uint8_t>(red);
        g[i] = static_cast<uint8_t>(green);
        b[i] = static_cast<uint8_t>(blue);
    }
}

FDK_CLONES void set_luma(uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b, int64_t count) {
    for (int64_t i = 0; i < count; ++i) r[i] = g[i] = b[i] = static_cast<uint8_t>(luma_of(r[i], g[i], b[i]));
}

}  // namespace

void brightness(uint8_t* planes, int64_t count, float factor) { blend_constant(planes, 3 * count, 0.0f, factor); }

void contrast(uint8_t* planes, int64_t count, float factor) {
    const double sum = static_cast<double>(luma_sum(planes, planes + count, planes + 2 * count, count));
    const int mean = static_cast<int>(sum / static_cast<double>(count) + 0.5);
    blend_constant(planes, 3 * count, static_cast<float>(mean), factor);
}

void saturation(uint8_t* planes, int64_t count, float factor) {
    blend_luma(planes, planes + count, planes + 2 * count, count, factor);
}

void gray(uint8_t* planes, int64_t count) { set_luma(planes, planes + count, planes + 2 * count, count); }

}  // namespace fdk::crop
