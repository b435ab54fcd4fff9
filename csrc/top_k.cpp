// The k largest numbers of rows that come block by block of columns, in ascending order of column.
//
// Each row keeps candidates as 64-bit keys, value above column, so that descending values with ties by ascending column
// are ascending keys. A number enters only above the k-th largest so far (the threshold), which one comparison of the
// largest of 32 decides for most; when the room for candidates is full, the best k stay and the threshold rises.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "lanes.h"
#include "parallel.h"

namespace {

using namespace fdk;

constexpr int kStep = 32;

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

FDK_INLINE float largest(f32x16 x) {
    f32x8 half[2];
    std::memcpy(half, &x, sizeof x);
    const f32x8 a = half[0] > half[1] ? half[0] : half[1];
    f32x4 quarter[2];
    std::memcpy(quarter, &a, sizeof a);
    const f32x4 b = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
    return std::max(std::max(b[0], b[1]), std::max(b[2], b[3]));
}

FDK_INLINE uint64_t key(float value, uint32_t column) {
    const float plain = value + 0.0f;  // -0 counts as 0
    int32_t bits;
    std::memcpy(&bits, &plain, sizeof bits);
    // Descending as unsigned numbers: flip the bits of what is positive but its sign. Without a branch: signs are random.
    const uint32_t descending = static_cast<uint32_t>(bits) ^ (~(bits >> 31) & 0x7fffffff);
    return static_cast<uint64_t>(descending) << 32 | column;
}

FDK_INLINE float value_of(uint64_t key) {
    const int32_t descending = static_cast<int32_t>(key >> 32), bits = descending ^ (~(descending >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

void keep_best(uint64_t* keys, int& count, int k, float& threshold) {
    if (count < k) return;
    std::nth_element(keys, keys + k - 1, keys + count);
    count = k;
    threshold = value_of(keys[k - 1]);
}

FDK_INLINE int add(const float* scores, int columns, uint32_t first, uint64_t* keys, int count, float threshold) {
    for (int i = 0; i < columns; ++i) {
        keys[count] = key(scores[i], first + i);
        count += scores[i] > threshold;
    }
    return count;
}

FDK_CLONES void add_row(const float* scores, int64_t columns, uint32_t first, int k, int room, uint64_t* keys, int& count,
                        float& threshold) {
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
        const f32x16 a = Lanes<float>::load(scores + j), b = Lanes<float>::load(scores + j + 16);
        if (!(largest(a > b ? a : b) > threshold)) continue;
        if (count + kStep > room) keep_best(keys, count, k, threshold);
        count = add(scores + j, kStep, first + j, keys, count, threshold);
    }
    if (count + kStep > room) keep_best(keys, count, k, threshold);
    count = add(scores + j, static_cast<int>(columns - j), first + j, keys, count, threshold);
    if (count >= k + kStep || threshold == -INFINITY) keep_best(keys, count, k, threshold);
}

}  // namespace

extern "C" {

// scores [rows][columns] at a distance of `stride` floats, column 0 being number `first` of its row. keys [rows][room],
// room >= k + 32, counts [rows] and thresholds [rows] (-inf at first) are brought up to date. Scores are finite.
int fdk_top_k_add(const float* scores, int64_t rows, int64_t columns, int64_t stride, int64_t first, int k, int room,
                  uint64_t* keys, int32_t* counts, float* thresholds, int num_threads) {
    constexpr int64_t kMostColumns = int64_t{1} << 32;
    if (k < 1 || room < int64_t{k} + kStep || !fits_rows(rows, columns, stride) || !fits({rows, room}) || first < 0 ||
        first > kMostColumns || columns > kMostColumns - first || !given(rows * columns > 0, scores) ||
        !given(rows > 0, keys, counts, thresholds))
        return 1;
    for (int64_t r = 0; r < rows; ++r)
        if (counts[r] < 0 || counts[r] > room) return 1;
    return guarded([&] {
        parallel_for(rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r)
                add_row(scores + r * stride, columns, static_cast<uint32_t>(first), k, room, keys + r * room, counts[r],
                        thresholds[r]);
        });
    });
}

// The first `wanted` of each row, best first: values and columns [rows][wanted]. Every row has had `wanted` columns.
int fdk_top_k_finish(int64_t rows, int64_t wanted, int room, uint64_t* keys, const int32_t* counts, float* values,
                     int64_t* columns, int num_threads) {
    if (!fits({rows, room}) || !fits({rows, wanted}) || !given(rows > 0, keys, counts) ||
        !given(rows * wanted > 0, values, columns))
        return 1;
    for (int64_t r = 0; r < rows; ++r)
        if (counts[r] < wanted || counts[r] > room) return 1;
    return guarded([&] {
        parallel_for(rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                uint64_t* row = keys + r * room;
                std::sort(row, row + counts[r]);
                for (int64_t i = 0; i < wanted; ++i) {
                    values[r * wanted + i] = value_of(row[i]);
                    columns[r * wanted + i] = static_cast<uint32_t>(row[i]);
                }
            }
        });
    });
}

}  // extern "C"
