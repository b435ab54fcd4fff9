// Sinkhorn-Knopp on logits [rows, columns] that are only read. With x = logits / temp and column offsets c,
//     samples:     q_rk = exp(x_rk - c_k) / sum_k exp(x_rk - c_k)
//     prototypes:  next c_k = c_k + log sum_r q_rk
// so that one visit of a row, while it lies in the second-level cache, serves both half-iterations with one exponential for
// each logit. After the first normalisation of the columns, sum_r q_rk >= 1 / (rows * columns): nothing underflows.

#include <cmath>
#include <vector>

#include "check.h"
#include "lanes.h"
#include "parallel.h"

namespace {

using namespace fdk;

constexpr int64_t kColumns = 512;  // per work item of the first pass
constexpr int64_t kRows = 64;      // of a tile of it, read twice from the second-level cache
constexpr int64_t kRun = 4096;     // terms added up in fp32 before they enter a double

// out[k] = log sum_r exp(scale x_rk) of `count` columns: -infinity where all logits are.
template <typename T>
FDK_INLINE void log_sums(const T* x, int64_t rows, int64_t stride, int64_t count, float scale, double* out) {
    float top[kColumns], fresh[kColumns], sum[kColumns];
    for (int64_t k = 0; k < kColumns; ++k) {
        top[k] = fresh[k] = -FLT_MAX;
        sum[k] = 0;
    }
    for (int64_t begin = 0; begin < rows; begin += kRows) {
        const int64_t end = begin + kRows < rows ? begin + kRows : rows;
        for (int64_t r = begin; r < end; ++r)
            for_vectors(count, FDK_LANES {
                const f32x16 value = load(x + r * stride + k, left), old = Lanes<float>::load(fresh + k);
                Lanes<float>::store(fresh + k, value > old ? value : old);
            });
        for (int64_t k = 0; k < kColumns; k += 16) {
            const f32x16 from = Lanes<float>::load(top + k), to = Lanes<float>::load(fresh + k);
            Lanes<float>::store(sum + k, Lanes<float>::load(sum + k) * exp_negative((from - to) * scale));
            Lanes<float>::store(top + k, to);
        }
        for (int64_t r = begin; r < end; ++r)
            for_vectors(count, FDK_LANES {
                const f32x16 y = (load(x + r * stride + k, left) - Lanes<float>::load(top + k)) * scale;
                Lanes<float>::store(sum + k, Lanes<float>::load(sum + k) + exp_negative(y));
            });
    }
    for (int64_t k = 0; k < count; ++k)
        out[k] = static_cast<double>(top[k]) * scale + std::log(static_cast<double>(sum[k]));
}

// c = logit * scale + rest: logits are compared before they are scaled, so that large ones lose no digits.
struct Offsets {
    std::vector<float> logit, rest;

    Offsets(const double* c, int64_t columns, float scale) : logit(columns), rest(columns) {
        for (int64_t k = 0; k < columns; ++k) {
            if (c[k] == -INFINITY) continue;  // a prototype that no sample admits has nothing to divide by
            logit[k] = static_cast<float>(c[k] / scale);
            if (std::isinf(logit[k])) continue;  // all but what is infinite itself becomes 0
            rest[k] = static_cast<float>(c[k] - static_cast<double>(logit[k]) * scale);
        }
    }
};

// e[k] = exp(scale x[k] - c[k] - their maximum); returns 1 / sum e.
template <typename T>
FDK_INLINE float weights(const T* x, const Offsets& c, int64_t columns, float scale, float* e) {
    const float *logit = c.logit.data(), *rest = c.rest.data();
    f32x16 top = fill(-FLT_MAX);
    for_vectors(columns, FDK_LANES {
        const f32x16 y = (load(x + k, left) - load(logit + k, left)) * scale - load(rest + k, left);
        store(e + k, y, left);
        const f32x16 valid = where_valid(y, fill(-FLT_MAX), left);
        top = valid > top ? valid : top;
    });
    const float max = horizontal_max(top);
    double total = 0;
    for (int64_t begin = 0; begin < columns; begin += kRun) {
        f32x16 sum = {};
        for_vectors(columns - begin < kRun ? columns - begin : kRun, FDK_LANES {
            const f32x16 w = exp_negative(load(e + begin + k, left) - max);
            store(e + begin + k, w, left);
            sum += where_valid(w, f32x16{}, left);
        });
        total += horizontal_sum(sum);
    }
    return static_cast<float>(1 / total);
}

template <typename T>
FDK_INLINE void add_row(const T* x, const Offsets& c, int64_t columns, float scale, float* e, float* sums) {
    const float factor = weights(x, c, columns, scale, e);
    for_vectors(columns, FDK_LANES { store(sums + k, load(sums + k, left) + load(e + k, left) * factor, left); });
}

template <typename T, typename O>
FDK_INLINE void write_row(const T* x, const Offsets& c, int64_t columns, float scale, float* e, O* out) {
    const float factor = weights(x, c, columns, scale, e);
    for_vectors(columns, FDK_LANES { store(out + k, load(e + k, left) * factor, left); });
}

#define FDK_FOR(name, T)                                                                                                     \
    FDK_CLONES void log_sums_##name(const void* x, int64_t at, int64_t rows, int64_t stride, int64_t count, float scale,     \
                                    double* out) {                                                                           \
        log_sums(static_cast<const T*>(x) + at, rows, stride, count, scale, out);                                            \
    }                                                                                                                        \
    FDK_CLONES void add_row_##name(const void* x, int64_t at, const Offsets& c, int64_t columns, float scale, float* e,      \
                                   float* sums) {                                                                            \
        add_row(static_cast<const T*>(x) + at, c, columns, scale, e, sums);                                                  \
    }                                                                                                                        \
    FDK_CLONES void write_f32_##name(const void* x, int64_t at, const Offsets& c, int64_t columns, float scale, float* e,    \
                                     void* out) {                                                                            \
        write_row(static_cast<const T*>(x) + at, c, columns, scale, e, static_cast<float*>(out) + at);                       \
    }                                                                                                                        \
    FDK_CLONES void write_bf16_##name(const void* x, int64_t at, const Offsets& c, int64_t columns, float scale, float* e,   \
                                      void* out) {                                                                           \
        write_row(static_cast<const T*>(x) + at, c, columns, scale, e, static_cast<uint16_t*>(out) + at);                    \
    }
FDK_FOR(f32, float)
FDK_FOR(bf16, uint16_t)
#undef FDK_FOR

bool given_logits(const void* logits, int64_t rows, int64_t columns, int bf16, double temp) {
    return fits({rows, columns}) && given(rows * columns > 0, logits) && is_flag(bf16) && temp > 0;
}

}  // namespace

extern "C" {

// logits [rows, columns], contiguous, fp32 or (bf16 = 1) bf16 -> out [columns]: log sum_r exp(logits_rk / temp).
int fdk_sinkhorn_columns(const void* logits, int64_t rows, int64_t columns, int bf16, double temp, double* out, int num_threads) {
    if (!given_logits(logits, rows, columns, bf16, temp) || !given(columns > 0, out)) return 1;
    return guarded([&] {
        const float scale = static_cast<float>(1 / temp);
        parallel_for_dynamic((columns + kColumns - 1) / kColumns, num_threads, [&](int64_t i) {
            const int64_t begin = i * kColumns, count = columns - begin < kColumns ? columns - begin : kColumns;
            (bf16 ? log_sums_bf16 : log_sums_f32)(logits, begin, rows, columns, count, scale, out + begin);
        });
    });
}

// One iteration, samples then prototypes: c [columns] -> out [columns], the next c.
int fdk_sinkhorn_step(const void* logits, const double* c, int64_t rows, int64_t columns, int bf16, double temp, double* out,
                      int num_threads) {
    if (!given_logits(logits, rows, columns, bf16, temp) || !given(columns > 0, c, out)) return 1;
    return guarded([&] {
        const float scale = static_cast<float>(1 / temp);
        const Offsets offsets(c, columns, scale);
        // The groups of rows depend on the problem alone, so the result does not depend on the number of threads; their
        // partial sums take at most an eighth of the logits' memory.
        const int64_t groups = rows < 16 ? 1 : rows < 256 ? rows / 8 : 32;
        std::vector<float> sums(groups * columns);
        parallel_for_dynamic(groups, num_threads, [&](int64_t g) {
            std::vector<float> e(columns);
            for (int64_t r = rows * g / groups; r < rows * (g + 1) / groups; ++r)
                (bf16 ? add_row_bf16 : add_row_f32)(logits, r * columns, offsets, columns, scale, e.data(),
                                                    sums.data() + g * columns);
        });
        parallel_for(columns, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) {
                double total = 0;
                for (int64_t g = 0; g < groups; ++g) total += sums[g * columns + k];
                out[k] = (c[k] == -INFINITY ? 0 : c[k]) + std::log(total);
            }
        });
    });
}

// out [rows, columns], fp32 or (out_bf16 = 1) bf16: softmax over the columns of logits / temp - c.
int fdk_sinkhorn_targets(const void* logits, const double* c, int64_t rows, int64_t columns, int bf16, double temp,
                         void* out, int out_bf16, int num_threads) {
    if (!given_logits(logits, rows, columns, bf16, temp) || !given(columns > 0, c) || !given(rows * columns > 0, out) ||
        !is_flag(out_bf16))
        return 1;
    return guarded([&] {
        const float scale = static_cast<float>(1 / temp);
        const Offsets offsets(c, columns, scale);
        const auto write = out_bf16 ? (bf16 ? write_bf16_bf16 : write_bf16_f32) : (bf16 ? write_f32_bf16 : write_f32_f32);
        parallel_for(rows, num_threads, [&](int64_t begin, int64_t end) {
            std::vector<float> e(columns);
            for (int64_t r = begin; r < end; ++r) write(logits, r * columns, offsets, columns, scale, e.data(), out);
        });
    });
}

}  // extern "C"
