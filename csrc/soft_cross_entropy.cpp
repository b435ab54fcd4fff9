// Cross-entropy of rows of logits with given targets: the losses in one pass over both, the gradient in another.
//
// With y = (x - max) * scale (scale = 1 / temperature), sum = sum exp(y), total = sum t and cross = sum t y of a row,
//     loss = total log(sum) - cross,    d loss / d x = scale * (total exp(y) / sum - t).
// A row is worked on in blocks of columns, each relative to its own maximum; blocks merge exactly, in double.

#include <cfloat>
#include <cmath>

#include "check.h"
#include "lanes.h"
#include "parallel.h"

namespace {

using namespace fdk;

constexpr int64_t kColumns = 4096;  // of a block: its logits stay in the first-level cache between the two loops

struct Block {
    float max, sum, cross, total;
};

template <typename T>
FDK_INLINE Block block(const T* row, const float* target, int64_t count, float scale) {
    f32x16 top = fill(-FLT_MAX);
    for_vectors(count, FDK_LANES {
        const f32x16 x = where_valid(load(row + k, left), fill(-FLT_MAX), left);
        top = x > top ? x : top;
    });
    const float max = horizontal_max(top);
    f32x16 sum = {}, cross = {}, total = {};
    for_vectors(count, FDK_LANES {
        const f32x16 y = where_valid((load(row + k, left) - max) * scale, f32x16{}, left);
        const f32x16 t = load(target + k, left);
        sum += where_valid(exp_negative(y), f32x16{}, left);
        // A prototype that is not wanted may be excluded: 0 * -infinity counts as 0.
        cross += t == 0.0f ? f32x16{} : t * y;
        total += t;
    });
    return {max, horizontal_sum(sum), horizontal_sum(cross), horizontal_sum(total)};
}

// out [count] <- coefficient * (factor exp(y) - target)
template <typename T>
FDK_INLINE void gradient(const T* row, const float* target, int64_t count, float scale, float max, float factor,
                         float coefficient, T* out) {
    for_vectors(count, FDK_LANES {
        const f32x16 p = exp_negative((load(row + k, left) - max) * scale) * factor;
        store(out + k, (p - load(target + k, left)) * coefficient, left);
    });
}

// `first` is the position of the block's first element in all matrices.
#define FDK_BOTH(suffix, T)                                                                                                  \
    FDK_CLONES Block block_##suffix(const void* logits, const float* targets, int64_t first, int64_t count, float scale) {   \
        return block(static_cast<const T*>(logits) + first, targets + first, count, scale);                                  \
    }                                                                                                                        \
    FDK_CLONES void gradient_##suffix(const void* logits, const float* targets, int64_t first, int64_t count, float scale,   \
                                      float max, float factor, float coefficient, void* out) {                               \
        gradient(static_cast<const T*>(logits) + first, targets + first, count, scale, max, factor, coefficient,             \
                 static_cast<T*>(out) + first);                                                                              \
    }
FDK_BOTH(f32, float)
FDK_BOTH(bf16, uint16_t)
#undef FDK_BOTH

bool given_problem(const void* logits, const float* targets, int64_t rows, int64_t columns, int bf16, double temp) {
    return fits({rows, columns}) && given(rows * columns > 0, logits, targets) && is_flag(bf16) && temp > 0;
}

}  // namespace

extern "C" {

// logits [rows, columns] (bf16: 0 fp32, 1 bf16) and targets [rows, columns] fp32, both contiguous; losses [rows];
// stats [2, rows]: the maximum of a row, and total / sum, from which the gradient is made.
int fdk_soft_cross_entropy(const void* logits, const float* targets, int64_t rows, int64_t columns, int bf16, double temp,
                           float* losses, float* stats, int num_threads) {
    if (!given_problem(logits, targets, rows, columns, bf16, temp) || !given(rows > 0, losses, stats)) return 1;
    const float scale = static_cast<float>(1 / temp);
    return guarded([&] {
        parallel_for_dynamic(rows, num_threads, [&](int64_t r) {
            double top = -FLT_MAX, sum = 0, cross = 0, total = 0;
            for (int64_t begin = 0; begin < columns; begin += kColumns) {
                const int64_t count = columns - begin < kColumns ? columns - begin : kColumns;
                const Block b = (bf16 ? block_bf16 : block_f32)(logits, targets, r * columns + begin, count, scale);
                const double higher = b.max > top ? b.max : top;
                const double before = (top - higher) / temp, now = (b.max - higher) / temp;
                sum = sum * std::exp(before) + b.sum * std::exp(now);
                // Of no target nothing moves, not even from or to an infinite maximum.
                cross += (total == 0 ? 0 : total * before) + b.cross + (b.total == 0 ? 0 : b.total * now);
                total += b.total;
                top = higher;
            }
            losses[r] = static_cast<float>((total == 0 ? 0 : total * std::log(sum)) - cross);
            stats[r] = static_cast<float>(top);
            stats[rows + r] = static_cast<float>(total / sum);
        });
    });
}

// out [rows, columns] <- grads [rows] * d losses / d logits, in the type of the logits.
int fdk_soft_cross_entropy_gradient(const void* logits, const float* targets, const float* stats, const float* grads,
                                    int64_t rows, int64_t columns, int bf16, double temp, void* out, int num_threads) {
    if (!given_problem(logits, targets, rows, columns, bf16, temp) || !given(rows > 0, stats, grads) ||
        !given(rows * columns > 0, out))
        return 1;
    const float scale = static_cast<float>(1 / temp);
    return guarded([&] {
        parallel_for_dynamic(rows, num_threads, [&](int64_t r) {
            const auto write = bf16 ? gradient_bf16 : gradient_f32;
            const float max = stats[r], factor = stats[rows + r], coefficient = static_cast<float>(grads[r] / temp);
            for (int64_t begin = 0; begin < columns; begin += kColumns) {
                const int64_t count = columns - begin < kColumns ? columns - begin : kColumns;
                write(logits, targets, r * columns + begin, count, scale, max, factor, coefficient, out);
            }
        });
    });
}

}  // extern "C"
