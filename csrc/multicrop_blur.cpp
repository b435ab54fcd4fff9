// Gaussian blur as three extended box filters per axis (Gwosdek, Grewenig, Bruhn and Weickert, "Theoretical foundations
// of Gaussian convolution by extended box filtering", SSVM 2011), each rounded to 8 bits, edges repeated.

#include "multicrop.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace fdk::crop {
namespace {

struct BoxFilter {
    int radius;             // whole values on either side of the middle one
    uint32_t inner, outer;  // weights of those 2 * radius + 1 values and of the two beyond, in units of 2**-24
};

// The types matter: they round as Pillow does.
BoxFilter box_filter(float sigma) {
    const float variance = sigma * sigma / 3.0f;  // of each of the three
    const float length = static_cast<float>(std::sqrt(12.0 * variance + 1.0));
    const float whole = static_cast<float>(std::floor((length - 1.0) / 2.0));
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    const float extended = whole + part;
    const int radius = static_cast<int>(extended);
    const uint32_t inner = static_cast<uint32_t>(static_cast<float>(1 << 24) / (extended * 2 + 1));
    return {radius, inner, ((1u << 24) - (2 * radius + 1) * inner) / 2};
}

FDK_INLINE uint8_t weigh(uint32_t inside, uint32_t ends, const BoxFilter& filter) {
    return static_cast<uint8_t>((inside * filter.inner + ends * filter.outer + (1u << 23)) >> 24);
}

// out[i] from taps[0 .. 2 * radius + 2][i]. For sigma up to 2 the radius is 0 or 1.
FDK_CLONES void box(const uint8_t* const* taps, uint8_t* __restrict out, int count, BoxFilter filter) {
    if (filter.radius == 0) {
        const uint8_t *a = taps[0], *b = taps[1], *c = taps[2];
        for (int i = 0; i < count; ++i) out[i] = weigh(b[i], static_cast<uint16_t>(a[i] + c[i]), filter);
    } else if (filter.radius == 1) {
        const uint8_t *a = taps[0], *b = taps[1], *c = taps[2], *d = taps[3], *e = taps[4];
        for (int i = 0; i < count; ++i)
            out[i] = weigh(static_cast<uint16_t>(b[i] + c[i] + d[i]), static_cast<uint16_t>(a[i] + e[i]), filter);
    } else {
        const int last = 2 * filter.radius + 2;
        for (int i = 0; i < count; ++i) {
            uint32_t inside = 0;
            for (int t = 1; t < last; ++t) inside += taps[t][i];
            out[i] = weigh(inside, taps[0][i] + taps[last][i], filter);
        }
    }
}

struct Scratch {
    Buffer<uint8_t> bytes;
    Buffer<const uint8_t*> taps;
};

}  // namespace

void gaussian_blur(uint8_t* planes, int size, float sigma) {
    static thread_local Scratch scratch;
    const BoxFilter filter = box_filter(sigma);
    const int reach = filter.radius + 1, taps = 2 * reach + 1;
    const size_t count = static_cast<size_t>(size) * size, padded = size + 2 * static_cast<size_t>(reach);
    const uint8_t** tap = scratch.taps.need(taps);
    uint8_t* other = scratch.bytes.need(count + 2 * padded);
    uint8_t *from = other + count, *to = from + padded;

    for (int c = 0; c < 3; ++c) {
        uint8_t* plane = planes + c * count;
        for (int y = 0; y < size; ++y) {
            uint8_t* line = plane + static_cast<size_t>(y) * size;
            std::memcpy(from + reach, line, size);
            for (int pass = 0; pass < 3; ++pass) {
                std::memset(from, from[reach], reach);
                std::memset(from + reach + size, from[reach + size - 1], reach);
                for (int t = 0; t < taps; ++t) tap[t] = from + t;
                box(tap, pass < 2 ? to + reach : line, size, filter);
                std::swap(from, to);
            }
        }
        uint8_t *source = plane, *target = other;
        for (int pass = 0; pass < 3; ++pass) {
            for (int y = 0; y < size; ++y) {
                for (int t = 0; t < taps; ++t)
                    tap[t] = source + static_cast<size_t>(std::clamp(y + t - reach, 0, size - 1)) * size;
                box(tap, target + static_cast<size_t>(y) * size, size, filter);
            }
            std::swap(source, target);
        }
        std::memcpy(plane, other, count);  // an odd number of passes ends in the other buffer
    }
}

}  // namespace fdk::crop
