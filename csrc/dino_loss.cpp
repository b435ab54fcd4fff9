// Multi-crop DINO loss on a block of columns of the logits: statistics in one pass, gradient in another.
//
// Rows are view-major: row v * images + b. With y = (x - max) * scale for the student (scale = 1 / s, x the raw logits) and
// likewise for the teacher (x = t - center, scale = 1 / u), the statistics of a row are
//     max, sum = sum exp(y);   teacher also: energy = sum exp(y) y;   pair (g, v): cross = sum_k exp(y_g) y_v
// so that entropy_g = log sum_g - energy_g / sum_g and the cross-entropy of a pair is log sum_v - cross_gv / sum_g: the
// maxima cancel, and nothing large is ever subtracted from something large. Statistics of two sets of columns merge exactly.

#include <cmath>
#include <vector>

#include "check.h"
#include "lanes.h"
#include "parallel.h"

namespace {

using namespace fdk;

// Columns per work item: long enough for the prefetcher, and a row of them fits the first-level cache.
constexpr int64_t kColumns = 4096;

struct Problem {
    int64_t images, views, n_global, columns;
    int64_t student_stride, teacher_stride;
    float student_scale, teacher_scale;  // 1 / temperature
};

// Statistics of one image over one set of columns: maxima and sums of the V student rows, maxima, sums and energies of the
// G teacher rows, cross terms [V, G]. The state of a whole problem holds one such record per image.
int64_t record_size(const Problem& p) { return 2 * p.views + 3 * p.n_global + p.views * p.n_global; }

template <typename F>
struct Record {
    F *student_max, *student_sum, *teacher_max, *teacher_sum, *energy, *cross;
    Record(const Problem& p, F* base)
        : student_max(base),
          student_sum(base + p.views),
          teacher_max(base + 2 * p.views),
          teacher_sum(teacher_max + p.n_global),
          energy(teacher_max + 2 * p.n_global),
          cross(teacher_max + 3 * p.n_global) {}
};


// exps: scratch [G, kColumns]
template <typename T>
FDK_INLINE void block_statistics(const Problem& p, const T* student, const T* teacher, const float* center, int64_t image,
                                 int64_t begin, int64_t count, float* exps, Record<float> out) {
    for (int64_t g = 0; g < p.n_global; ++g) {
        const T* row = teacher + (g * p.images + image) * p.teacher_stride + begin;
        const float* c = center + begin;
        float* e = exps + g * kColumns;
        f32x16 top = fill(-FLT_MAX);
        for_vectors(count, FDK_LANES {
            const f32x16 x = load(row + k, left) - load(c + k, left);
            Lanes<float>::store(e + k, x);
            const f32x16 valid = where_valid(x, fill(-FLT_MAX), left);
            top = valid > top ? valid : top;
        });
        const float max = horizontal_max(top), scale = p.teacher_scale;
        f32x16 sum = {}, energy = {};
        for_vectors(count, FDK_LANES {
            const f32x16 y = where_valid((Lanes<float>::load(e + k) - max) * scale, f32x16{}, left);
            const f32x16 w = where_valid(exp_negative(y), f32x16{}, left);
            Lanes<float>::store(e + k, w);
            sum += w;
            // A weight of 0 contributes nothing, as the limit of w log w does, even where y is -infinite.
            energy += w == 0.0f ? f32x16{} : w * y;
        });
        out.teacher_max[g] = max;
        out.teacher_sum[g] = horizontal_sum(sum);
        out.energy[g] = horizontal_sum(energy);
    }
    for (int64_t v = 0; v < p.views; ++v) {
        const T* row = student + (v * p.images + image) * p.student_stride + begin;
        f32x16 top = fill(-FLT_MAX);
        for_vectors(count, FDK_LANES {
            const f32x16 x = where_valid(load(row + k, left), fill(-FLT_MAX), left);
            top = x > top ? x : top;
        });
        const float max = horizontal_max(top), scale = p.student_scale;
        f32x16 sum = {};
        // Two teacher views, the usual case, share the loop with the sum of exponentials; any further ones follow.
        for (int64_t g = 0; g < p.n_global; g += 2) {
            const float* e0 = exps + g * kColumns;
            const float* e1 = g + 1 < p.n_global ? e0 + kColumns : e0;
            f32x16 cross0 = {}, cross1 = {};
            for_vectors(count, FDK_LANES {
                const f32x16 y = where_valid((load(row + k, left) - max) * scale, f32x16{}, left);
                if (g == 0) sum += where_valid(exp_negative(y), f32x16{}, left);
                cross0 += Lanes<float>::load(e0 + k) * y;
                cross1 += Lanes<float>::load(e1 + k) * y;
            });
            out.cross[v * p.n_global + g] = horizontal_sum(cross0);
            if (g + 1 < p.n_global) out.cross[v * p.n_global + g + 1] = horizontal_sum(cross1);
        }
        out.student_max[v] = max;
        out.student_sum[v] = horizontal_sum(sum);
    }
}

FDK_CLONES void block_statistics_f32(const Problem& p, const void* student, const void* teacher, const float* center,
                                     int64_t image, int64_t begin, int64_t count, float* exps, const Record<float>& out) {
    block_statistics(p, static_cast<const float*>(student), static_cast<const float*>(teacher), center, image, begin, count,
                     exps, out);
}

FDK_CLONES void block_statistics_bf16(const Problem& p, const void* student, const void* teacher, const float* center,
                                      int64_t image, int64_t begin, int64_t count, float* exps, const Record<float>& out) {
    block_statistics(p, static_cast<const uint16_t*>(student), static_cast<const uint16_t*>(teacher), center, image, begin,
                     count, exps, out);
}

// Moves a sum (and a first moment of y, whose zero moves along) from an old maximum to a new one.
struct Shift {
    double offset, factor;  // offset = (old max - new max) * scale <= 0, factor = exp(offset)
    Shift(double from, double to, double scale) : offset((from - to) * scale), factor(std::exp(offset)) {}
};

void merge(const Problem& p, Record<double> all, Record<float> part) {
    for (int64_t v = 0; v < p.views; ++v) {
        const double top = std::fmax(all.student_max[v], part.student_max[v]);
        const Shift a(all.student_max[v], top, p.student_scale), b(part.student_max[v], top, p.student_scale);
        for (int64_t g = 0; g < p.n_global; ++g) {
            const double teacher_top = std::fmax(all.teacher_max[g], part.teacher_max[g]);
            const Shift c(all.teacher_max[g], teacher_top, p.teacher_scale);
            const Shift d(part.teacher_max[g], teacher_top, p.teacher_scale);
            double& cross = all.cross[v * p.n_global + g];
            // The guards keep 0 * infinity out: a sum of 0 has no moment to move.
            const double old = all.teacher_sum[g] == 0 ? 0 : c.factor * (cross + a.offset * all.teacher_sum[g]);
            const double fresh = part.cross[v * p.n_global + g] + b.offset * part.teacher_sum[g];
            cross = old + (d.factor == 0 ? 0 : d.factor * fresh);
        }
        all.student_sum[v] = a.factor * all.student_sum[v] + b.factor * part.student_sum[v];
        all.student_max[v] = top;
    }
    for (int64_t g = 0; g < p.n_global; ++g) {
        const double top = std::fmax(all.teacher_max[g], part.teacher_max[g]);
        const Shift a(all.teacher_max[g], top, p.teacher_scale), b(part.teacher_max[g], top, p.teacher_scale);
        const double old = all.teacher_sum[g] == 0 ? 0 : a.factor * (all.energy[g] + a.offset * all.teacher_sum[g]);
        const double fresh = part.energy[g] + b.offset * part.teacher_sum[g];
        all.energy[g] = old + (b.factor == 0 ? 0 : b.factor * fresh);
        all.teacher_sum[g] = a.factor * all.teacher_sum[g] + b.factor * part.teacher_sum[g];
        all.teacher_max[g] = top;
    }
}

// targets: scratch [G + 2, kColumns]: weights of the teacher views, their sum, the sum without the view at hand.
template <typename T, typename O>
FDK_INLINE void block_gradient(const Problem& p, const T* student, const T* teacher, const float* center, int64_t image,
                               int64_t begin, int64_t count, Record<const double> state, float coefficient, O* out,
                               int64_t out_stride, float* targets) {
    float* total = targets + p.n_global * kColumns;
    for (int64_t g = 0; g < p.n_global; ++g) {
        const T* row = teacher + (g * p.images + image) * p.teacher_stride + begin;
        const float* c = center + begin;
        const float max = static_cast<float>(state.teacher_max[g]), scale = p.teacher_scale;
        const float weight = static_cast<float>(coefficient / state.teacher_sum[g]);
        float* q = targets + g * kColumns;
        for_vectors(count, FDK_LANES {
            const f32x16 w = exp_negative((load(row + k, left) - load(c + k, left) - max) * scale) * weight;
            Lanes<float>::store(q + k, w);
            Lanes<float>::store(total + k, g == 0 ? w : Lanes<float>::load(total + k) + w);
        });
    }
    for (int64_t v = 0; v < p.views; ++v) {
        const int64_t r = v * p.images + image;
        const T* row = student + r * p.student_stride + begin;
        O* out_row = out + r * out_stride + begin;
        const float* target = total;
        if (v < p.n_global) {  // a view is not paired with itself: the others are added up, without cancellation
            float* others = total + kColumns;
            for (int64_t k = 0; k < count; ++k) others[k] = 0;
            for (int64_t g = 0; g < p.n_global; ++g)
                if (g != v)
                    for (int64_t k = 0; k < count; ++k) others[k] += targets[g * kColumns + k];
            target = others;
        }
        const float pairs = static_cast<float>(v < p.n_global ? p.n_global - 1 : p.n_global);
        const float max = static_cast<float>(state.student_max[v]), scale = p.student_scale;
        const float weight = pairs > 0 ? static_cast<float>(coefficient * pairs / state.student_sum[v]) : 0;
        for_vectors(count, FDK_LANES {
            const f32x16 prob = exp_negative((load(row + k, left) - max) * scale) * weight;
            store(out_row + k, prob - Lanes<float>::load(target + k), left);
        });
    }
}

#define FDK_GRADIENT(name, T, O)                                                                                             \
    FDK_CLONES void name(const Problem& p, const void* student, const void* teacher, const float* center, int64_t image,     \
                         int64_t begin, int64_t count, const Record<const double>& state, float coefficient, void* out,      \
                         int64_t out_stride, float* targets) {                                                               \
        block_gradient(p, static_cast<const T*>(student), static_cast<const T*>(teacher), center, image, begin, count, state, \
                       coefficient, static_cast<O*>(out), out_stride, targets);                                              \
    }
FDK_GRADIENT(block_gradient_f32, float, float)
FDK_GRADIENT(block_gradient_bf16, uint16_t, uint16_t)
#undef FDK_GRADIENT

bool fits_problem(const Problem& p) {
    return p.views > 0 && p.n_global > 0 && fits({p.images, p.views, p.n_global, p.columns});
}

bool given_logits(const Problem& p, const void* student, const void* teacher, const float* center, int bf16,
                  double student_temp, double teacher_temp) {
    return fits_problem(p) && fits_rows(p.views * p.images, p.columns, p.student_stride) &&
           fits_rows(p.n_global * p.images, p.columns, p.teacher_stride) && is_flag(bf16) && student_temp > 0 &&
           teacher_temp > 0 && given(p.images * p.columns > 0, student, teacher, center);
}

int64_t blocks_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

}  // namespace

extern "C" {

// Length in doubles of the state of a problem (-1: there is none), and its empty value.
int64_t fdk_dino_state_size(int64_t images, int64_t views, int64_t n_global) {
    const Problem p{images, views, n_global, 0, 0, 0, 0, 0};
    return fits_problem(p) ? images * record_size(p) : -1;
}

int fdk_dino_state_init(int64_t images, int64_t views, int64_t n_global, double* state, int) {
    const Problem p{images, views, n_global, 0, 0, 0, 0, 0};
    if (!fits_problem(p) || !given(images > 0, state)) return 1;
    for (int64_t b = 0; b < images; ++b) {
        const int64_t size = record_size(p);
        for (int64_t i = 0; i < size; ++i) state[b * size + i] = 0;
        const Record<double> r(p, state + b * size);
        for (int64_t v = 0; v < views; ++v) r.student_max[v] = -FLT_MAX;
        for (int64_t g = 0; g < n_global; ++g) r.teacher_max[g] = -FLT_MAX;
    }
    return 0;
}

// Adds `columns` columns of the logits to the state. student [V*B, columns] and teacher [G*B, columns] of one type
// (bf16: 0 fp32, 1 bf16), rows `*_stride` elements apart; center [columns] fp32.
int fdk_dino_statistics(const void* student, const void* teacher, const float* center, int64_t images, int64_t views,
                        int64_t n_global, int64_t columns, int64_t student_stride, int64_t teacher_stride, int bf16,
                        double student_temp, double teacher_temp, double* state, int num_threads) {
    const Problem p{images, views, n_global, columns, student_stride, teacher_stride,
                    static_cast<float>(1 / student_temp), static_cast<float>(1 / teacher_temp)};
    if (!given_logits(p, student, teacher, center, bf16, student_temp, teacher_temp) || !given(images > 0, state)) return 1;
    return guarded([&] {
        const int64_t blocks = blocks_of(columns), size = record_size(p);
        std::vector<float> parts(images * blocks * size);
        parallel_for_dynamic(images * blocks, num_threads, [&](int64_t i) {
            std::vector<float> exps(n_global * kColumns);
            const int64_t begin = i % blocks * kColumns, count = columns - begin < kColumns ? columns - begin : kColumns;
            const Record<float> out(p, parts.data() + i * size);
            (bf16 ? block_statistics_bf16 : block_statistics_f32)(p, student, teacher, center, i / blocks, begin, count,
                                                                  exps.data(), out);
        });
        for (int64_t i = 0; i < images * blocks; ++i)
            merge(p, Record<double>(p, state + i / blocks * size), Record<float>(p, parts.data() + i * size));
    });
}

// result = loss, mean teacher entropy: means over images and pairs (over images and teacher views).
int fdk_dino_result(int64_t images, int64_t views, int64_t n_global, const double* state, double* result, int) {
    const Problem p{images, views, n_global, 0, 0, 0, 0, 0};
    if (!fits_problem(p) || !given(images > 0, state) || !given(true, result)) return 1;
    double loss = 0, entropy = 0;
    for (int64_t b = 0; b < images; ++b) {
        const Record<const double> r(p, state + b * record_size(p));
        for (int64_t g = 0; g < n_global; ++g) {
            entropy += std::log(r.teacher_sum[g]) - r.energy[g] / r.teacher_sum[g];
            for (int64_t v = 0; v < views; ++v)
                if (v != g) loss += std::log(r.student_sum[v]) - r.cross[v * n_global + g] / r.teacher_sum[g];
        }
    }
    result[0] = loss / static_cast<double>(n_global * (views - 1) * images);
    result[1] = entropy / static_cast<double>(n_global * images);
    return 0;
}

// out [V*B, columns], of the logits' type: grad_loss * d loss / d student, from the complete state.
int fdk_dino_gradient(const void* student, const void* teacher, const float* center, int64_t images, int64_t views,
                      int64_t n_global, int64_t columns, int64_t student_stride, int64_t teacher_stride, int bf16,
                      double student_temp, double teacher_temp, const double* state, double grad_loss, void* out,
                      int64_t out_stride, int num_threads) {
    const Problem p{images, views, n_global, columns, student_stride, teacher_stride,
                    static_cast<float>(1 / student_temp), static_cast<float>(1 / teacher_temp)};
    if (!given_logits(p, student, teacher, center, bf16, student_temp, teacher_temp) ||
        !fits_apart(views * images, columns, out_stride) || !given(images > 0, state) || !given(images * columns > 0, out))
        return 1;
    return guarded([&] {
        const int64_t blocks = blocks_of(columns), size = record_size(p);
        const float coefficient =
            static_cast<float>(grad_loss / (student_temp * static_cast<double>(n_global * (views - 1) * images)));
        parallel_for_dynamic(images * blocks, num_threads, [&](int64_t i) {
            std::vector<float> targets((n_global + 2) * kColumns);
            const int64_t begin = i % blocks * kColumns, count = columns - begin < kColumns ? columns - begin : kColumns;
            const Record<const double> record(p, state + i / blocks * size);
            (bf16 ? block_gradient_bf16 : block_gradient_f32)(p, student, teacher, center, i / blocks, begin, count, record,
                                                              coefficient, out, out_stride, targets.data());
        });
    });
}

}  // extern "C"
