// Cross-entropy of student rows with teacher rows given by index, on blocks of columns of the logits.
//
// With y = (x - max) * scale for the student (scale = 1 / s, x the raw logits) and likewise for the teacher (x = t - center,
// scale = 1 / u), each block of kColumns columns of a row leaves a record of its own, relative to its own maximum:
//     student row r: max, sum = sum exp(y), for each of its targets cross = sum_k exp(y_t) y_r
//     teacher row t: max, sum, energy = sum exp(y) y
// Records of all blocks merge exactly (fdk_matched_combine), so neither the size of a chunk nor the number of threads changes
// a bit. Logits are left as exp(y), which the records turn into probabilities, so the gradient (fdk_matched_gradient) takes no
// further exponential. A teacher row's are computed once, however many student rows point to it, and never copied.

#include <cfloat>
#include <cmath>
#include <vector>

#include "check.h"
#include "lanes.h"
#include "parallel.h"

namespace {

using namespace fdk;

constexpr int64_t kColumns = 1024;  // of a block: a row of it fits the first-level cache several times
constexpr int64_t kRows = 16;       // rows per work item: neighbours mostly share their teacher rows

struct Teacher {
    float max, sum, energy;
};

// out [count] <- exp(y)
template <typename T>
FDK_INLINE Teacher teacher_block(const T* row, const float* center, int64_t count, float scale, float* out) {
    f32x16 top = fill(-FLT_MAX);
    for_vectors(count, FDK_LANES {
        const f32x16 x = load(row + k, left) - load(center + k, left);
        store(out + k, x, left);
        const f32x16 valid = where_valid(x, fill(-FLT_MAX), left);
        top = valid > top ? valid : top;
    });
    const float max = horizontal_max(top);
    f32x16 sum = {}, energy = {};
    for_vectors(count, FDK_LANES {
        const f32x16 y = where_valid((load(out + k, left) - max) * scale, f32x16{}, left);
        const f32x16 w = where_valid(exp_negative(y), f32x16{}, left);
        store(out + k, w, left);
        sum += w;
        // A weight of 0 contributes nothing, as the limit of w log w does, even where y is -infinite.
        energy += w == 0.0f ? f32x16{} : w * y;
    });
    return {max, horizontal_sum(sum), horizontal_sum(energy)};
}

// weights[i], i < n: exp(y) of the targets; row <- exp(y), out <- max, sum, cross_i
template <typename T>
FDK_INLINE void student_block(T* row, int64_t count, float scale, const float* const* weights, int64_t n, float* out) {
    f32x16 top = fill(-FLT_MAX);
    for_vectors(count, FDK_LANES {
        const f32x16 x = where_valid(load(row + k, left), fill(-FLT_MAX), left);
        top = x > top ? x : top;
    });
    const float max = horizontal_max(top);
    f32x16 sum = {};
    // Two targets, the usual case, share the loop with the exponentials; any further ones come before, on the logits.
    for (int64_t i = (n - 1) / 2 * 2; i >= 0 && n > 0; i -= 2) {
        const float *w0 = weights[i], *w1 = weights[i + 1 < n ? i + 1 : i];
        f32x16 cross0 = {}, cross1 = {};
        for_vectors(count, FDK_LANES {
            const f32x16 y = where_valid((load(row + k, left) - max) * scale, f32x16{}, left);
            cross0 += load(w0 + k, left) * y;
            cross1 += load(w1 + k, left) * y;
            if (i == 0) {
                const f32x16 e = where_valid(exp_negative(y), f32x16{}, left);
                store(row + k, e, left);
                sum += e;
            }
        });
        out[2 + i] = horizontal_sum(cross0);
        if (i + 1 < n) out[3 + i] = horizontal_sum(cross1);
    }
    out[0] = max;
    out[1] = horizontal_sum(sum);
}

// row [count] holds exp(y) and becomes coefficient * (factor exp(y) - sum_i factors_i weights_i)
template <typename T>
FDK_INLINE void gradient_block(T* row, int64_t count, float factor, float coefficient, const float* const* weights,
                               const float* factors, int64_t n, float* scratch) {
    if (n == 0) {
        for (int64_t k = 0; k < count; ++k) row[k] = 0;
        return;
    }
    for (int64_t i = 2; i < n; ++i) {
        for_vectors(count, FDK_LANES {
            const f32x16 more = load(weights[i] + k, left) * factors[i];
            store(scratch + k, i == 2 ? more : load(scratch + k, left) + more, left);
        });
    }
    const float *w0 = weights[0], *w1 = weights[n > 1 ? 1 : 0];
    const float f0 = factors[0], f1 = n > 1 ? factors[1] : 0.0f;
    for_vectors(count, FDK_LANES {
        f32x16 target = load(w0 + k, left) * f0 + load(w1 + k, left) * f1;
        if (n > 2) target += load(scratch + k, left);
        store(row + k, (load(row + k, left) * factor - target) * coefficient, left);
    });
}

#define FDK_BOTH(suffix, T)                                                                                                  \
    FDK_CLONES Teacher teacher_##suffix(const void* row, int64_t begin, const float* center, int64_t count, float scale,     \
                                        float* out) {                                                                        \
        return teacher_block(static_cast<const T*>(row) + begin, center, count, scale, out);                                 \
    }                                                                                                                        \
    FDK_CLONES void student_##suffix(void* row, int64_t begin, int64_t count, float scale, const float* const* weights,      \
                                     int64_t n, float* out) {                                                                \
        student_block(static_cast<T*>(row) + begin, count, scale, weights, n, out);                                          \
    }                                                                                                                        \
    FDK_CLONES void gradient_##suffix(void* row, int64_t begin, int64_t count, float factor, float coefficient,              \
                                      const float* const* weights, const float* factors, int64_t n, float* scratch) {        \
        gradient_block(static_cast<T*>(row) + begin, count, factor, coefficient, weights, factors, n, scratch);              \
    }
FDK_BOTH(f32, float)
FDK_BOTH(bf16, uint16_t)
#undef FDK_BOTH

// f(row, begin, count) for every row and every block of the columns, blocks of one group of rows after another.
template <typename F>
void for_blocks(int64_t rows, int64_t columns, int num_threads, const F& f) {
    parallel_for_dynamic((rows + kRows - 1) / kRows, num_threads, [&](int64_t group) {
        const int64_t end = group * kRows + kRows < rows ? group * kRows + kRows : rows;
        for (int64_t begin = 0; begin < columns; begin += kColumns)
            for (int64_t r = group * kRows; r < end; ++r)
                f(r, begin, columns - begin < kColumns ? columns - begin : kColumns);
    });
}

// found <- the rows of `base` [teacher_rows, columns] that the valid entries of match point to; returns their number.
int64_t gather(const int64_t* match, int64_t targets, const float* base, int64_t columns, int64_t begin, const float** found) {
    int64_t n = 0;
    for (int64_t g = 0; g < targets; ++g)
        if (match[g] >= 0) found[n++] = base + match[g] * columns + begin;
    return n;
}

bool are_matches(const int64_t* match, int64_t rows, int64_t teacher_rows, int64_t targets) {
    if (!fits({rows, targets}) || !fits({teacher_rows}) || !given(rows * targets > 0, match)) return false;
    for (int64_t i = 0; i < rows * targets; ++i)
        if (match[i] >= teacher_rows) return false;
    return true;
}

bool are_temperatures(double student, double teacher) { return student > 0 && teacher > 0; }

// Moves a sum (and a first moment of y, whose zero moves along) from a block's maximum to that of the row.
struct Shift {
    double offset, factor;  // offset = (from - to) * scale <= 0, factor = exp(offset)
    Shift(double from, double to, double scale) : offset((from - to) * scale), factor(std::exp(offset)) {}
};

}  // namespace

extern "C" {

// Records of `columns` columns, a multiple of 1024 but for the last ones of all, from block `first_block` on.
// student [rows, columns] and teacher [teacher_rows, columns] are logits of one type (bf16: 0 fp32, 1 bf16), center [columns],
// match [rows, targets], negative for none. student <- exp(y) of rows that have a target; weights [teacher_rows, columns] <-
// exp(y) of the teacher, and may be `teacher` itself. student_parts [rows, blocks, 2 + targets], teacher_parts [.., blocks, 3].
int fdk_matched_statistics(void* student, const void* teacher, const float* center, const int64_t* match, int64_t rows,
                           int64_t teacher_rows, int64_t targets, int64_t columns, int bf16, double student_temp,
                           double teacher_temp, float* weights, int64_t first_block, int64_t blocks, float* student_parts,
                           float* teacher_parts, int num_threads) {
    const bool given_rows = given(rows > 0, student, student_parts) && given(teacher_rows > 0, teacher, weights, teacher_parts);
    if (!are_matches(match, rows, teacher_rows, targets) || !fits({rows, columns}) || !fits({teacher_rows, columns}) ||
        !fits({rows, blocks, targets + 2}) || !fits({teacher_rows, blocks, 3}) || first_block < 0 || columns < 0 ||
        first_block > blocks - (columns + kColumns - 1) / kColumns || !given(columns > 0, center) || !given_rows ||
        !is_flag(bf16) || !are_temperatures(student_temp, teacher_temp))
        return 1;
    return guarded([&] {
        const float student_scale = static_cast<float>(1 / student_temp), teacher_scale = static_cast<float>(1 / teacher_temp);
        for_blocks(teacher_rows, columns, num_threads, [&](int64_t t, int64_t begin, int64_t count) {
            const Teacher found = (bf16 ? teacher_bf16 : teacher_f32)(teacher, t * columns + begin, center + begin, count,
                                                                      teacher_scale, weights + t * columns + begin);
            float* out = teacher_parts + (t * blocks + first_block + begin / kColumns) * 3;
            out[0] = found.max, out[1] = found.sum, out[2] = found.energy;
        });
        for_blocks(rows, columns, num_threads, [&](int64_t r, int64_t begin, int64_t count) {
            thread_local std::vector<const float*> found;
            found.resize(targets);
            const int64_t n = gather(match + r * targets, targets, weights, columns, begin, found.data());
            float* out = student_parts + (r * blocks + first_block + begin / kColumns) * (2 + targets);
            (bf16 ? student_bf16 : student_f32)(student, r * columns + begin, count, student_scale, found.data(), n, out);
        });
    });
}

// From the records of all blocks: student_stats [2, rows] and teacher_stats [2, teacher_rows] (max and sum of every row), the
// entropies [teacher_rows] of the teacher's rows, and result = loss, weighted divergence from the targets.
int fdk_matched_combine(const int64_t* match, const float* row_weight, int64_t rows, int64_t teacher_rows, int64_t targets,
                        int64_t blocks, double student_temp, double teacher_temp, const float* student_parts,
                        const float* teacher_parts, float* student_stats, float* teacher_stats,
                        double* entropies, double* result, int num_threads) {
    if (!are_matches(match, rows, teacher_rows, targets) || !fits({rows, blocks, targets + 2}) ||
        !fits({teacher_rows, blocks, 3}) || !given(rows > 0, row_weight, student_parts, student_stats) ||
        !given(teacher_rows > 0, teacher_parts, teacher_stats, entropies) || !given(true, result) ||
        !are_temperatures(student_temp, teacher_temp))
        return 1;
    return guarded([&] {
        const double student_scale = 1 / student_temp, teacher_scale = 1 / teacher_temp;
        std::vector<double> factors(teacher_rows * blocks), sums(teacher_rows);
        std::vector<double> losses(rows), divergences(rows);
        parallel_for(teacher_rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                const float* parts = teacher_parts + t * blocks * 3;
                double top = -FLT_MAX, sum = 0, energy = 0;
                for (int64_t b = 0; b < blocks; ++b) top = std::fmax(top, parts[b * 3]);
                for (int64_t b = 0; b < blocks; ++b) {
                    const Shift shift(parts[b * 3], top, teacher_scale);
                    factors[t * blocks + b] = shift.factor;
                    sum += shift.factor * parts[b * 3 + 1];
                    energy += shift.factor * (parts[b * 3 + 2] + shift.offset * parts[b * 3 + 1]);
                }
                sums[t] = sum;
                entropies[t] = std::log(sum) - energy / sum;
                teacher_stats[t] = static_cast<float>(top);
                teacher_stats[teacher_rows + t] = static_cast<float>(sum);
            }
        });
        parallel_for(rows, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                const float* parts = student_parts + r * blocks * (2 + targets);
                double top = -FLT_MAX, sum = 0, loss = 0, entropy = 0;
                int64_t n = 0;  // crosses of a record: one for each valid target, in order
                for (int64_t g = 0; g < targets; ++g) n += match[r * targets + g] >= 0;
                for (int64_t b = 0; n > 0 && b < blocks; ++b) top = std::fmax(top, parts[b * (2 + targets)]);
                for (int64_t b = 0; n > 0 && b < blocks; ++b) {
                    const float* part = parts + b * (2 + targets);
                    const Shift shift(part[0], top, student_scale);
                    sum += shift.factor * part[1];
                    for (int64_t g = 0, i = 0; g < targets; ++g) {
                        const int64_t t = match[r * targets + g];
                        if (t < 0) continue;
                        const double factor = factors[t * blocks + b] / sums[t];
                        const double cross = part[2 + i++] + shift.offset * teacher_parts[(t * blocks + b) * 3 + 1];
                        loss -= factor == 0 ? 0 : factor * cross;  // no 0 * infinity
                    }
                }
                for (int64_t g = 0; g < targets; ++g) {
                    const int64_t t = match[r * targets + g];
                    if (t >= 0) entropy += entropies[t];
                }
                if (n > 0) loss += static_cast<double>(n) * std::log(sum);
                losses[r] = row_weight[r] * loss;
                divergences[r] = row_weight[r] * (loss - entropy);
                student_stats[r] = static_cast<float>(top);
                student_stats[rows + r] = static_cast<float>(sum);
            }
        });
        result[0] = result[1] = 0;
        for (int64_t r = 0; r < rows; ++r) result[0] += losses[r], result[1] += divergences[r];
    });
}

// student [rows, columns], exp(y), <- d loss / d logits; weights, records and statistics as the functions above left them.
int fdk_matched_gradient(void* student, const float* weights, const int64_t* match, const float* row_weight, int64_t rows,
                         int64_t teacher_rows, int64_t targets, int64_t columns, int bf16, double student_temp,
                         double teacher_temp, int64_t first_block, int64_t blocks, const float* student_parts,
                         const float* teacher_parts, const float* student_stats, const float* teacher_stats,
                         int num_threads) {
    const bool given_rows = given(rows > 0, student, row_weight, student_parts, student_stats) &&
                            given(teacher_rows > 0, weights, teacher_parts, teacher_stats);
    if (!are_matches(match, rows, teacher_rows, targets) || !fits({rows, columns}) || !fits({teacher_rows, columns}) ||
        !fits({rows, blocks, targets + 2}) || !fits({teacher_rows, blocks, 3}) || first_block < 0 || columns < 0 ||
        first_block > blocks - (columns + kColumns - 1) / kColumns || !given_rows || !is_flag(bf16) ||
        !are_temperatures(student_temp, teacher_temp))
        return 1;
    return guarded([&] {
        for_blocks(rows, columns, num_threads, [&](int64_t r, int64_t begin, int64_t count) {
            thread_local std::vector<const float*> found;
            thread_local std::vector<float> factors;
            found.resize(targets), factors.resize(targets);
            float scratch[kColumns];
            const int64_t block = first_block + begin / kColumns;
            const int64_t n = gather(match + r * targets, targets, weights, columns, begin, found.data());
            for (int64_t g = 0, i = 0; g < targets; ++g) {
                const int64_t t = match[r * targets + g];
                if (t < 0) continue;
                const Shift shift(teacher_parts[(t * blocks + block) * 3], teacher_stats[t], 1 / teacher_temp);
                factors[i++] = static_cast<float>(shift.factor / teacher_stats[teacher_rows + t]);
            }
            const Shift shift(student_parts[(r * blocks + block) * (2 + targets)], student_stats[r], 1 / student_temp);
            const float factor = static_cast<float>(static_cast<double>(n) * shift.factor / student_stats[rows + r]);
            (bf16 ? gradient_bf16 : gradient_f32)(student, r * columns + begin, count, factor,
                                                  static_cast<float>(row_weight[r] / student_temp), found.data(),
                                                  factors.data(), n, scratch);
        });
    });
}

}  // extern "C"
