// Antialiased bicubic resize in two passes with 22-bit integer weights and 8 bits between the passes, as Pillow 13 does:
// the results are the same to the bit.
//
// A pass in the first direction turns lines of interleaved RGB into lines of three planes ("line": R, G, B, each `pitch`
// bytes); a pass in the second direction makes output bytes from whole lines, whatever these hold. So either pass may come
// first, and only the order decides which lines the other one sees.

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

constexpr int kBits = 22;

// Weight of input first[o] + t in output o: value[o * taps + t], in units of 2**-kBits, t < count[o] <= taps.
struct Weights {
    int taps = 0;
    Buffer<int> first_, count_, value_;
    Buffer<double> row_;
    int *first = nullptr, *count = nullptr, *value = nullptr;

    void compute(int length, int size, bool reversed);
};

FDK_INLINE double cubic(double d) {
    const double near = (1.5 * d - 2.5) * d * d + 1;
    const double far = (((d - 5) * d + 8) * d - 4) * -0.5;
    return d < 1 ? near : d < 2 ? far : 0.0;
}

FDK_CLONES void cubic_row(double* __restrict row, int first, int count, double center, double inverse) {
    for (int t = 0; t < count; ++t) row[t] = cubic(std::fabs((first + t - center + 0.5) * inverse));
}

FDK_CLONES void to_fixed(const double* __restrict row, int* __restrict value, int count, double sum) {
    for (int t = 0; t < count; ++t) {
        const double scaled = row[t] / sum * (1 << kBits);
        value[t] = static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
}

void Weights::compute(int length, int size, bool reversed) {
    const double scale = static_cast<double>(length) / size, stretch = std::max(scale, 1.0);
    const double support = 2 * stretch;
    taps = static_cast<int>(std::ceil(support)) * 2 + 1;
    first = first_.need(size);
    count = count_.need(size);
    value = value_.need(static_cast<size_t>(size) * taps);
    double* row = row_.need(taps);
    for (int i = 0; i < size; ++i) {
        const int o = reversed ? size - 1 - i : i;
        const double center = (i + 0.5) * scale;
        first[o] = std::max(static_cast<int>(center - support + 0.5), 0);
        count[o] = std::min(static_cast<int>(center + support + 0.5), length) - first[o];
        cubic_row(row, first[o], count[o], center, 1.0 / stretch);
        double sum = 0;
        for (int t = 0; t < count[o]; ++t) sum += row[t];
        int* values = value + static_cast<size_t>(o) * taps;
        to_fixed(row, values, count[o], sum);
        std::fill(values + count[o], values + taps, 0);
    }
}

FDK_INLINE uint8_t to_byte(int sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

void horizontal_plain(const uint8_t* row, const Weights& w, int size, uint8_t* line, int pitch) {
    for (int o = 0; o < size; ++o) {
        const uint8_t* p = row + 3 * w.first[o];
        const int* k = w.value + static_cast<size_t>(o) * w.taps;
        int r = 1 << (kBits - 1), g = r, b = r;
        for (int t = 0; t < w.count[o]; ++t, p += 3) {
            r += p[0] * k[t];
            g += p[1] * k[t];
            b += p[2] * k[t];
        }
        line[o] = to_byte(r);
        line[pitch + o] = to_byte(g);
        line[2 * pitch + o] = to_byte(b);
    }
}

FDK_CLONES void add_row(int* __restrict sums, const uint8_t* __restrict row, int count, int k) {
    for (int i = 0; i < count; ++i) sums[i] += row[i] * k;
}

FDK_CLONES void finish_row(const int* __restrict sums, uint8_t* __restrict line, int count) {
    for (int i = 0; i < count; ++i) line[i] = static_cast<uint8_t>(std::min(std::max(sums[i] >> kBits, 0), 255));
}

void vertical_plain(const uint8_t* const* rows, const Weights& w, int o, uint8_t* line, int bytes) {
    constexpr int kPart = 1024;
    int sums[kPart];
    const int* k = w.value + static_cast<size_t>(o) * w.taps;
    for (int begin = 0; begin < bytes; begin += kPart) {
        const int count = std::min(kPart, bytes - begin);
        std::fill(sums, sums + count, 1 << (kBits - 1));
        for (int t = 0; t < w.count[o]; ++t) add_row(sums, rows[w.first[o] + t] + begin, count, k[t]);
        finish_row(sums, line + begin, count);
    }
}

struct Scratch {
    Weights across, down;
    Buffer<uint8_t> lines, line;
    Buffer<const uint8_t*> rows;
};

void store(const uint8_t* line, int pitch, int size, int y, uint8_t* planes) {
    const size_t count = static_cast<size_t>(size) * size;
    for (int c = 0; c < 3; ++c) std::memcpy(planes + c * count + static_cast<size_t>(y) * size, line + c * pitch, size);
}

}  // namespace

void resize(const Image& image, const Box& box, int size, bool flip, uint8_t* planes) {
    static thread_local Scratch scratch;
    Scratch& s = scratch;
    s.across.compute(box.width, size, flip);
    s.down.compute(box.height, size, false);
    const int pitch = (size + 15) / 16 * 16;
    const uint8_t** rows = s.rows.need(std::max(box.height, size));
    uint8_t* line = s.line.need(3 * static_cast<size_t>(pitch));
    for (int y = 0; y < box.height; ++y) rows[y] = image.pixels + 3 * ((box.y + y) * image.width + box.x);

    if (box.height > size && box.height - size > 2 * (box.width - size)) {
        const size_t bytes = 3 * static_cast<size_t>(box.width);
        uint8_t* shorter = s.lines.need(bytes * size);
        for (int y = 0; y < size; ++y) vertical_plain(rows, s.down, y, shorter + y * bytes, static_cast<int>(bytes));
        for (int y = 0; y < size; ++y) {
            horizontal_plain(shorter + y * bytes, s.across, size, line, pitch);
            store(line, pitch, size, y, planes);
        }
    } else {
        const size_t bytes = 3 * static_cast<size_t>(pitch);
        uint8_t* narrower = s.lines.need(bytes * box.height);
        for (int y = 0; y < box.height; ++y) {
            horizontal_plain(rows[y], s.across, size, narrower + y * bytes, pitch);
            rows[y] = narrower + y * bytes;
        }
        for (int y = 0; y < size; ++y) {
            vertical_plain(rows, s.down, y, line, static_cast<int>(bytes));
            store(line, pitch, size, y, planes);
        }
    }
}

}  // namespace fdk::crop
