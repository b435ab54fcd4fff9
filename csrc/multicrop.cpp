// Multi-crop augmentation of a batch: one task per (image, view), any thread may take any task.

#include "multicrop.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cstring>

#include "check.h"
#include "parallel.h"

namespace fdk::crop {
namespace {

enum Column {  // of a row of parameters
    kY, kX, kH, kW, kFlip, kJitter, kBrightness, kContrast, kSaturation, kHue, kOrder, kGray, kSigma, kSolarize,
    kColumns = 16
};

std::atomic<int> most{kAvx512};

// Permutation number `index` (lexicographic) of the four jitter operations.
void jitter_order(int index, int order[4]) {
    for (int i = 0; i < 4; ++i) order[i] = kBrightness + i;
    for (; index > 0; --index) std::next_permutation(order, order + 4);
}

void jitter(uint8_t* planes, int64_t count, const float* row) {
    int order[4];
    jitter_order(static_cast<int>(row[kOrder]), order);
    for (const int column : order) {
        const float value = row[column];
        if (column == kBrightness) brightness(planes, count, value);
        if (column == kContrast) contrast(planes, count, value);
        if (column == kSaturation) saturation(planes, count, value);
        if (column == kHue) hue(planes, count, value);
    }
}

// What the numbers become, indices and integers, must be inside their ranges; NaN is in none.
bool is_row(const float* row, float height, float width) {
    const auto within = [row](Column column, float low, float high) { return row[column] >= low && row[column] <= high; };
    return within(kY, 0, height) && within(kX, 0, width) && within(kH, 1, height - row[kY]) && within(kW, 1, width - row[kX]) &&
           within(kBrightness, 0, FLT_MAX) && within(kContrast, 0, FLT_MAX) && within(kSaturation, 0, FLT_MAX) &&
           within(kHue, -0.5f, 0.5f) && within(kOrder, 0, 23) && within(kSigma, 0, 100);
}

bool are_rows(int64_t n, int64_t views, const int32_t* sizes, const float* params) {
    for (int64_t task = 0; task < n * views; ++task) {
        const int32_t* size = sizes + 2 * (task / views);
        if (!is_row(params + task * kColumns, static_cast<float>(size[0]), static_cast<float>(size[1]))) return false;
    }
    return true;
}

void augment(const Image& image, const float* row, int size, uint8_t* planes) {
    const int64_t count = static_cast<int64_t>(size) * size;
    const auto pixels = [row](Column column) { return static_cast<int>(row[column]); };
    const Box box{pixels(kY), pixels(kX), pixels(kH), pixels(kW)};
    resize(image, box, size, row[kFlip] != 0, planes);
    if (row[kJitter] != 0) jitter(planes, count, row);
    if (row[kGray] != 0) gray(planes, count);
    if (row[kSigma] > 0) gaussian_blur(planes, size, row[kSigma]);
}

}  // namespace

Simd simd() {
    static const Simd best = [] {
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2")) return kPlain;
        for (const bool missing : {!__builtin_cpu_supports("avx512bw"), !__builtin_cpu_supports("avx512vl"),
                                   !__builtin_cpu_supports("avx512vbmi"), !__builtin_cpu_supports("avx512vnni")})
            if (missing) return kAvx2;
        return kAvx512;
#else
        return kPlain;
#endif
    }();
    return std::min(best, static_cast<Simd>(most.load(std::memory_order_relaxed)));
}

void limit_simd(Simd level) { most.store(level); }

}  // namespace fdk::crop

extern "C" int fdk_multicrop_limit_simd(int level) {
    if (level < fdk::crop::kPlain || level > fdk::crop::kAvx512) return 1;
    fdk::crop::limit_simd(static_cast<fdk::crop::Simd>(level));
    return 0;
}

// images: n pointers to [height][width][3] bytes; sizes: n times (height, width); params: float [n][views][16];
// outs: a pointer for each view to [n][3][S][S] items of item_size (2 or 4) bytes, S = out_sizes[view];
// table: item [3][256], what each value becomes.
extern "C" int fdk_multicrop(int64_t n, const uint8_t* const* images, const int32_t* sizes, int64_t views,
                             const float* params, void* const* outs, const int32_t* out_sizes, const void* table,
                             int item_size, int num_threads) {
    using namespace fdk::crop;
    if ((item_size != 2 && item_size != 4) || !fdk::fits({n, views, kColumns}) || !fdk::given(true, table) ||
        !fdk::given(n * views > 0, images, sizes, params, outs, out_sizes))
        return 1;
    if (n * views == 0) return 0;
    for (int64_t i = 0; i < n; ++i)
        if (images[i] == nullptr || !is_side(sizes[2 * i]) || !is_side(sizes[2 * i + 1])) return 1;
    for (int64_t view = 0; view < views; ++view)
        if (outs[view] == nullptr || !is_side(out_sizes[view]) || !fdk::fits({n, 3, out_sizes[view], out_sizes[view]})) return 1;
    if (!are_rows(n, views, sizes, params)) return 1;
    const size_t channel = 256 * static_cast<size_t>(item_size);  // bytes of one channel of the table
    return fdk::guarded([&] {
        // Solarization is part of the second table: value v becomes what 255 - v does, from 128 on.
        const uint8_t* normal = static_cast<const uint8_t*>(table);
        std::vector<uint8_t> solarized(normal, normal + 3 * channel);
        for (size_t c = 0; c < 3; ++c)
            for (size_t v = 128; v < 256; ++v)
                std::memcpy(&solarized[c * channel + v * item_size], normal + c * channel + (255 - v) * item_size,
                            item_size);

        fdk::parallel_for_dynamic(n * views, num_threads, [&](int64_t task) {
            static thread_local Buffer<uint8_t> memory;
            const int64_t i = task / views, view = task % views;
            const int size = out_sizes[view];
            const int64_t count = static_cast<int64_t>(size) * size;
            const float* row = params + task * kColumns;
            uint8_t* planes = memory.need(3 * count);
            augment({images[i], sizes[2 * i], sizes[2 * i + 1]}, row, size, planes);

            const uint8_t* values = row[kSolarize] != 0 ? solarized.data() : normal;
            uint8_t* out = static_cast<uint8_t*>(outs[view]) + i * 3 * count * item_size;
            for (int c = 0; c < 3; ++c)
                lookup(planes + c * count, count, values + c * channel, item_size, out + c * count * item_size);
        });
    });
}
