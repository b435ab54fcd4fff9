// Antialiased bicubic resize in two passes with 22-bit integer weights and 8 bits between the passes, as in Pillow 13,
// with the same results to the bit.

#include "multicrop_resize.h"

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

FDK_INLINE uint8_t to_byte(int sum) { return static_cast<uint8_t>(std::min(std::max(sum >> kBits, 0), 255)); }

void across_plain(const uint8_t* const* rows, int count, const Weights& w, const Packed&, int pitch,
                  uint8_t* lines) {
    for (int y = 0; y < count; ++y, lines += 3 * static_cast<size_t>(pitch)) {
        for (int o = 0; o < w.size; ++o) {
            const uint8_t* p = rows[y] + 3 * w.first[o];
            const int* k = w.value + static_cast<size_t>(o) * w.taps;
            int r = 1 << (kBits - 1), g = r, b = r;
            for (int t = 0; t < w.count[o]; ++t, p += 3) {
                r += p[0] * k[t];
                g += p[1] * k[t];
                b += p[2] * k[t];
            }
            lines[o] = to_byte(r);
            lines[pitch + o] = to_byte(g);
            lines[2 * pitch + o] = to_byte(b);
        }
    }
}

FDK_CLONES void add_row(int* __restrict sums, const uint8_t* __restrict row, int count, int k) {
    for (int i = 0; i < count; ++i) sums[i] += row[i] * k;
}

FDK_CLONES void finish_row(const int* __restrict sums, uint8_t* __restrict line, int count) {
    for (int i = 0; i < count; ++i) line[i] = to_byte(sums[i]);
}

void down_plain(const uint8_t* const* rows, const Weights& w, const Packed&, int o, int bytes, uint8_t* line) {
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
    Packed across_packed, down_packed;
    Buffer<uint8_t> lines, line, tail;
    Buffer<const uint8_t*> rows;
};

// The kernels for this processor, with the weights in the form they read.
void prepare(Scratch& s, Across& across, Down& down) {
    across = across_plain;
    down = down_plain;
#if defined(__x86_64__)
    const Simd level = simd();
    if (level == kAvx512) {
        pack_digits(s.down, s.down_packed);
        down = down_avx512;
        if (pack_blocks(s.across, s.across_packed)) {
            across = across_avx512;
            return;
        }
    } else if (level == kAvx2) {
        pack_pairs(s.down, s.down_packed);
        down = down_avx2;
    }
    if (level >= kAvx2) {
        pack_pairs(s.across, s.across_packed);
        across = across_avx2;
    }
#else
    (void)s;
#endif
}

// Pointers to the rows of the box, each readable kSlack bytes beyond its end.
const uint8_t** box_rows(const Image& image, const Box& box, Scratch& s) {
    const uint8_t** rows = s.rows.need(std::max(box.height, s.down.size));
    const size_t bytes = 3 * static_cast<size_t>(box.width), room = bytes + kSlack;
    const uint8_t* end = image.pixels + 3 * image.height * image.width;
    uint8_t* tail = nullptr;
    for (int y = 0; y < box.height; ++y) {
        rows[y] = image.pixels + 3 * ((box.y + y) * image.width + box.x);
        if (static_cast<size_t>(end - rows[y]) >= room) continue;
        if (tail == nullptr) tail = s.tail.need(room * (box.height - y));  // this row and those below it
        std::memcpy(tail, rows[y], bytes);
        rows[y] = tail;
        tail += room;
    }
    return rows;
}

void store(const uint8_t* line, int pitch, const Target& target, int y, uint8_t* planes) {
    const size_t columns = target.columns, count = columns * target.rows;
    for (int c = 0; c < 3; ++c) std::memcpy(planes + c * count + y * columns, line + c * pitch, columns);
}

}  // namespace

void Weights::compute(int length, int outputs, int begin, int wanted, bool reversed) {
    size = wanted;
    const double scale = static_cast<double>(length) / outputs, stretch = std::max(scale, 1.0);
    const double support = 2 * stretch;
    taps = (static_cast<int>(std::ceil(support)) * 2 + 1 + 3) / 4 * 4;
    first = first_.need(size);
    count = count_.need(size);
    value = value_.need(static_cast<size_t>(size) * taps);
    double* row = row_.need(taps);
    for (int o = 0; o < size; ++o) {
        const int i = reversed ? outputs - 1 - (begin + o) : begin + o;
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

int Weights::trim(int* needed) {
    const int start = *std::min_element(first, first + size);
    *needed = 0;
    for (int o = 0; o < size; ++o) {
        first[o] -= start;
        *needed = std::max(*needed, first[o] + count[o]);
    }
    return start;
}

void resize(const Image& image, const Box& box, const Target& target, uint8_t* planes) {
    static thread_local Scratch scratch;
    Scratch& s = scratch;
    const int pitch = (target.columns + 15) / 16 * 16;
    s.across.compute(box.width, target.width, target.left, target.columns, target.flip);
    s.down.compute(box.height, target.height, target.top, target.rows, false);
    Box part = box;
    part.x += s.across.trim(&part.width);
    part.y += s.down.trim(&part.height);
    Across across;
    Down down;
    prepare(s, across, down);
    const uint8_t** rows = box_rows(image, part, s);
    const size_t line_bytes = 3 * static_cast<size_t>(pitch);
    uint8_t* line = s.line.need(line_bytes + kSlack);

    if (box.height > target.height && box.height - target.height > 2 * (box.width - target.width)) {
        const int bytes = 3 * part.width;
        const size_t step = bytes + kSlack;
        uint8_t* shorter = s.lines.need(step * target.rows);
        for (int y = 0; y < target.rows; ++y) down(rows, s.down, s.down_packed, y, bytes, shorter + y * step);
        for (int y = 0; y < target.rows; ++y) {
            const uint8_t* row = shorter + y * step;
            across(&row, 1, s.across, s.across_packed, pitch, line);
            store(line, pitch, target, y, planes);
        }
    } else {
        uint8_t* narrower = s.lines.need(line_bytes * part.height + kSlack);
        across(rows, part.height, s.across, s.across_packed, pitch, narrower);
        for (int y = 0; y < part.height; ++y) rows[y] = narrower + y * line_bytes;
        for (int y = 0; y < target.rows; ++y) {
            down(rows, s.down, s.down_packed, y, static_cast<int>(line_bytes), line);
            store(line, pitch, target, y, planes);
        }
    }
}

void resize(const Image& image, const Box& box, int size, bool flip, uint8_t* planes) {
    resize(image, box, {size, size, 0, 0, size, size, flip}, planes);
}

}  // namespace fdk::crop
