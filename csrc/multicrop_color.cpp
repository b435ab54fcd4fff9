// Colour jitter on planes, with the 8-bit results of Pillow and torchvision.
//
// The loops are plain, for the compiler to vectorise. Those that mix types work on blocks of kBlock pixels kept in arrays
// of 32-bit numbers, because the compiler chooses its vector length by the smallest type of a loop.

#include "multicrop.h"

#include <algorithm>
#include <cmath>

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

FDK_CLONES void blend_constant(uint8_t* __restrict p, int64_t count, float base, float factor) {
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(blend(base, p[i], factor));
}

FDK_CLONES int64_t luma_sum(const uint8_t* __restrict r, const uint8_t* __restrict g, const uint8_t* __restrict b, int64_t count) {
    int64_t sum = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, count);
        int part = 0;
        for (int64_t i = begin; i < end; ++i) part += luma_of(r[i], g[i], b[i]);
        sum += part;
    }
    return sum;
}

FDK_CLONES void blend_luma(uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b, int64_t count, float factor) {
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

// RGB -> 8-bit HSV, hue + shift modulo 256, -> RGB, for up to kBlock pixels.
FDK_INLINE void rotate(const int* __restrict r, const int* __restrict g, const int* __restrict b, int* __restrict red,
                       int* __restrict green, int* __restrict blue, int count, int shift) {
    for (int i = 0; i < count; ++i) {
        const int top = std::max(r[i], std::max(g[i], b[i])), bottom = std::min(r[i], std::min(g[i], b[i]));
        const int middle = r[i] + g[i] + b[i] - top - bottom;
        // In each of the six sectors the angle is one float32 sum: an odd number plus or minus the share of the middle
        // value in the chroma.
        const float share = static_cast<float>(top - middle) / static_cast<float>(std::max(top - bottom, 1));
        const bool red_top = r[i] == top, green_top = g[i] == top;
        const bool rising = red_top ? g[i] == bottom && b[i] != bottom : green_top ? b[i] == bottom : g[i] == bottom;
        const float corner = red_top ? (rising ? -1.0f : 1.0f) : green_top ? (rising ? 1.0f : 3.0f) : (rising ? 5.0f : 3.0f);
        const float angle = (red_top || green_top) == rising ? corner + share : corner - share;
        const double turns = angle * (1.0 / 6.0) + 1.0;
        const float fraction = static_cast<float>(turns >= 1.0 ? turns - 1.0 : turns);
        const int h = top == bottom ? 0 : static_cast<int>(fraction * 255.0);
        const float part = static_cast<float>(top - bottom) / static_cast<float>(std::max(top, 1));
        const int s = static_cast<int>(part * 255.0);

        const int shifted = (h + shift) & 255;
        const int sector = (shifted * 6 * 257 + 257) >> 16;  // 6 * shifted / 255
        const float f = static_cast<float>(shifted * 6.0 / 255.0 - sector);
        const float fs = static_cast<float>(s / 255.0);
        const double away = (sector & 1) ? static_cast<double>(fs * f) : fs * (1.0 - f);
        const int low = static_cast<int>(top * (1.0 - fs) + 0.5);
        const int mid = static_cast<int>(top * (1.0 - away) + 0.5);
        red[i] = sector == 1 || sector == 4 ? mid : sector == 2 || sector == 3 ? low : top;
        green[i] = sector == 0 || sector == 3 || sector == 6 ? mid : sector == 1 || sector == 2 ? top : low;
        blue[i] = sector == 2 || sector == 5 ? mid : sector == 3 || sector == 4 ? top : low;
    }
}

FDK_CLONES void rotate_all(uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b, int64_t count, int shift) {
    alignas(64) int in[3][kBlock], out[3][kBlock];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int block = static_cast<int>(std::min(kBlock, count - begin));
        for (int i = 0; i < block; ++i) in[0][i] = r[begin + i];
        for (int i = 0; i < block; ++i) in[1][i] = g[begin + i];
        for (int i = 0; i < block; ++i) in[2][i] = b[begin + i];
        rotate(in[0], in[1], in[2], out[0], out[1], out[2], block, shift);
        for (int i = 0; i < block; ++i) r[begin + i] = static_cast<uint8_t>(out[0][i]);
        for (int i = 0; i < block; ++i) g[begin + i] = static_cast<uint8_t>(out[1][i]);
        for (int i = 0; i < block; ++i) b[begin + i] = static_cast<uint8_t>(out[2][i]);
    }
}

}  // namespace

void brightness(uint8_t* bytes, int64_t count, float factor) { blend_constant(bytes, count, 0.0f, factor); }

void contrast(uint8_t* planes, int64_t count, float factor) {
    const double sum = static_cast<double>(luma_sum(planes, planes + count, planes + 2 * count, count));
    blend_constant(planes, 3 * count, std::floor(static_cast<float>(sum / static_cast<double>(count) + 0.5)), factor);
}

void saturation(uint8_t* planes, int64_t count, float factor) {
    blend_luma(planes, planes + count, planes + 2 * count, count, factor);
}

void hue(uint8_t* planes, int64_t count, float turns) {
    rotate_all(planes, planes + count, planes + 2 * count, count, static_cast<int>(turns * 255.0));
}

void gray(uint8_t* planes, int64_t count) { set_luma(planes, planes + count, planes + 2 * count, count); }

}  // namespace fdk::crop
