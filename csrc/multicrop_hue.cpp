// Hue shift on planes, with the 8-bit results of Pillow and torchvision.
//
// Written with vectors as wide as the registers: GCC handles wider ones element by element, and it makes FDK_CLONES too
// late to help, so the body is included once for each kind of processor.

#include <cstring>

#include "multicrop.h"
#include "simd.h"

// A fused multiply-add would round once where two roundings are meant.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace fdk::crop {
namespace {

namespace plain {
constexpr int kLanes = 4;
#include "multicrop_hue.inc"
}

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
constexpr int kLanes = 8;
#include "multicrop_hue.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
namespace avx512 {
constexpr int kLanes = 16;
#include "multicrop_hue.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace

void hue(uint8_t* planes, int64_t count, float turns) {
    auto rotate_all = plain::rotate_all;
#if defined(__x86_64__)
    if (simd() == kAvx2) rotate_all = avx2::rotate_all;
    if (simd() == kAvx512) rotate_all = avx512::rotate_all;
#endif
    rotate_all(planes, planes + count, planes + 2 * count, count, static_cast<int>(turns * 255.0));
}

}  // namespace fdk::crop
