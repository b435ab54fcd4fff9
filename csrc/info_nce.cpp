// Running softmax over blocks of columns: each block of similarities [rows, columns] is turned in place into weights
//     p_rj = exp((l_rj - m_r) / temp),  m_r = the largest similarity of row r so far
// and what was added up before, sum_r = sum_j p_rj and mean_r = sum_j p_rj n_j, is moved to the new maximum.

#include <cmath>

#include "check.h"
#include "lanes.h"
#include "parallel.h"

namespace {

using namespace fdk;

constexpr int64_t kRun = 4096;  // terms added up in fp32 before they enter a double

template <typename T>
FDK_INLINE void fold_row(T* l, int64_t columns, float scale, bool write, float& max, double& sum, float* mean, int64_t d) {
    f32x16 tops = fill(max);
    for_vectors(columns, FDK_LANES {
        const f32x16 x = where_valid(load(l + k, left), fill(-FLT_MAX), left);
        tops = x > tops ? x : tops;
    });
    const float top = horizontal_max(tops);
    const float moved = std::exp((max - top) * scale);
    double total = 0;
    for (int64_t begin = 0; begin < columns; begin += kRun) {
        f32x16 part = {};
        for_vectors(columns - begin < kRun ? columns - begin : kRun, FDK_LANES {
            const f32x16 p = exp_negative((load(l + begin + k, left) - top) * scale);
            if (write) store(l + begin + k, p, left);
            part += where_valid(p, f32x16{}, left);
        });
        total += horizontal_sum(part);
    }
    sum = sum * moved + total;
    max = top;
    for (int64_t i = 0; i < d; ++i) mean[i] *= moved;
}

FDK_CLONES void fold_row_f32(void* l, int64_t at, int64_t columns, float scale, bool write, float& max, double& sum, float* mean,
                             int64_t d) {
    fold_row(static_cast<float*>(l) + at, columns, scale, write, max, sum, mean, d);
}
FDK_CLONES void fold_row_bf16(void* l, int64_t at, int64_t columns, float scale, bool write, float& max, double& sum,
                              float* mean, int64_t d) {
    fold_row(static_cast<uint16_t*>(l) + at, columns, scale, write, max, sum, mean, d);
}

}  // namespace

extern "C" {

// logits [rows, columns], contiguous, fp32 or (bf16 = 1) bf16, become weights if `write` is 1. max [rows] fp32, sum [rows]
// double and mean [rows, d] fp32 are brought up to date, but for the block's own weights times its columns in mean.
int fdk_info_nce_fold(void* logits, int64_t rows, int64_t columns, int bf16, double temp, int write, float* max, double* sum,
                      float* mean, int64_t d, int num_threads) {
    if (!fits({rows, columns}) || !fits({rows, d}) || !given(rows * columns > 0, logits) || !is_flag(bf16) || !is_flag(write) ||
        !(temp > 0) || !given(rows > 0, max, sum) || !given(rows * d > 0, mean))
        return 1;
    return guarded([&] {
        const float scale = static_cast<float>(1 / temp);
        parallel_for(rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r)
                (bf16 ? fold_row_bf16 : fold_row_f32)(logits, r * columns, columns, scale, write != 0, max[r], sum[r],
                                                      mean + r * d, d);
        });
    });
}

}  // extern "C"
