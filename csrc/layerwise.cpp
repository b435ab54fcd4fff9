// Multi-tensor LARS and LAMB on fp32 tensors: the sums that their trust ratios need, then the update with the teacher's
// EMA and bf16 copies in the same pass.

#include <cmath>

#include "check.h"
#include "parallel.h"
#include "simd.h"
#include "updates.h"

namespace {

using fdk::Block;

struct Lars {  // one row of the `scalars` argument of fdk_lars
    float grad, param, momentum, lr;
};

FDK_CLONES void lars(float* __restrict p, const float* __restrict g, float* __restrict b, int64_t n, const Lars& scalars) {
    const Lars s = scalars;
    for (int64_t i = 0; i < n; ++i) {
        b[i] = s.momentum * b[i] + (s.grad * g[i] + s.param * p[i]);
        p[i] -= s.lr * b[i];
    }
}

// g.g, g.p and p.p in double: of fp32 numbers they neither overflow nor vanish.
FDK_CLONES void products(const float* g, const float* p, int64_t n, double* sums) {
    constexpr int kLanes = 16;
    double gg[kLanes] = {}, gp[kLanes] = {}, pp[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) {
            const double x = g[i + j], y = p[i + j];
            gg[j] += x * x;
            gp[j] += x * y;
            pp[j] += y * y;
        }
    for (; i < n; ++i) {
        const double x = g[i], y = p[i];
        gg[i % kLanes] += x * x;
        gp[i % kLanes] += x * y;
        pp[i % kLanes] += y * y;
    }
    sums[0] = sums[1] = sums[2] = 0;
    for (int j = 0; j < kLanes; ++j) sums[0] += gg[j], sums[1] += gp[j], sums[2] += pp[j];
}

struct Lamb {  // one row of the `scalars` argument of fdk_lamb_moments and fdk_lamb
    float grad_factor, beta1_rest, beta2, beta2_rest, inv_correction1, inv_sqrt_correction2, eps, decay, step_size;
};

FDK_INLINE float lamb_update(float p, float m, float v, const Lamb& s) {
    return m * s.inv_correction1 / (std::sqrt(v) * s.inv_sqrt_correction2 + s.eps) + s.decay * p;
}

// Moments, and the sums of p^2 and of the squared update.
FDK_CLONES void lamb_moments(const float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                             int64_t n, const Lamb& scalars, double* sums) {
    constexpr int kLanes = 32;
    const Lamb s = scalars;
    double pp[kLanes] = {}, uu[kLanes] = {};
    const auto moments = [&](int64_t i) __attribute__((always_inline)) {
        const float grad = g[i] * s.grad_factor;
        m[i] += s.beta1_rest * (grad - m[i]);
        v[i] = s.beta2 * v[i] + s.beta2_rest * (grad * grad);
        return lamb_update(p[i], m[i], v[i], s);
    };
    float updates[kLanes];
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) updates[j] = moments(i + j);
        for (int j = 0; j < kLanes; ++j) uu[j] += static_cast<double>(updates[j]) * updates[j];
        for (int j = 0; j < kLanes; ++j) pp[j] += static_cast<double>(p[i + j]) * p[i + j];
    }
    for (; i < n; ++i) {
        const double update = moments(i);
        uu[i % kLanes] += update * update;
        pp[i % kLanes] += static_cast<double>(p[i]) * p[i];
    }
    sums[0] = sums[1] = 0;
    for (int j = 0; j < kLanes; ++j) sums[0] += pp[j], sums[1] += uu[j];
}

FDK_CLONES void lamb(float* __restrict p, const float* __restrict m, const float* __restrict v, int64_t n, const Lamb& scalars) {
    const Lamb s = scalars;
    for (int64_t i = 0; i < n; ++i) p[i] -= s.step_size * lamb_update(p[i], m[i], v[i], s);
}

// f(block, partial) on every block, where it writes `width` sums; sums[tensor * width + k] adds them up in order.
template <typename F>
void sum_blocks(int64_t n, const int64_t* sizes, int width, double* sums, int num_threads, const F& f) {
    const std::vector<Block> blocks = fdk::cut(n, sizes);
    std::vector<double> partial(blocks.size() * width);
    fdk::parallel_for_dynamic(static_cast<int64_t>(blocks.size()), num_threads,
                              [&](int64_t i) { f(blocks[i], &partial[i * width]); });
    for (int64_t i = 0; i < n * width; ++i) sums[i] = 0;
    for (size_t i = 0; i < blocks.size(); ++i)
        for (int k = 0; k < width; ++k) sums[blocks[i].tensor * width + k] += partial[i * width + k];
}

}  // namespace

extern "C" {

// sums [n, 3]: g.g, g.p, p.p.
int fdk_lars_sums(int64_t n, const float* const* params, const float* const* grads, const int64_t* sizes, double* sums,
                  int num_threads) {
    if (!fdk::given_tensors(n, sizes, params, grads) || !fdk::given(n > 0, sums)) return 1;
    return fdk::guarded([&] {
        sum_blocks(n, sizes, 3, sums, num_threads, [&](const Block& b, double* out) {
            products(grads[b.tensor] + b.begin, params[b.tensor] + b.begin, b.count, out);
        });
    });
}

// For each tensor with its row of scalars [n, 4] (factors of the gradient and of the parameter, momentum, lr):
// b <- momentum b + (x g + y p), p <- p - lr b; then the followers as in fdk_adamw_ema.
int fdk_lars(int64_t n, float* const* params, const float* const* grads, float* const* buffers, float* const* teachers,
             uint16_t* const* copies, uint16_t* const* teacher_copies, const int64_t* sizes, const float* scalars,
             double momentum, int num_threads) {
    const fdk::Followers followers{teachers, copies, teacher_copies, momentum};
    if (!fdk::given_tensors(n, sizes, params, grads, buffers) || !fdk::given(n > 0, scalars) || !followers.given(n, sizes))
        return 1;
    return fdk::guarded([&] {
        const std::vector<Block> blocks = fdk::cut(n, sizes);
        fdk::parallel_for_dynamic(static_cast<int64_t>(blocks.size()), num_threads, [&](int64_t i) {
            const Block& b = blocks[i];
            Lars s;
            std::memcpy(&s, scalars + 4 * b.tensor, sizeof s);
            lars(params[b.tensor] + b.begin, grads[b.tensor] + b.begin, buffers[b.tensor] + b.begin, b.count, s);
            followers.follow(params[b.tensor], b);
        });
    });
}

// New moments with the rows of scalars [n, 9]: grad factor, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1^step),
// 1 / sqrt(1 - beta2^step), eps, weight decay, step size (unused here); sums [n, 2]: p.p and u.u of the update u.
int fdk_lamb_moments(int64_t n, const float* const* params, const float* const* grads, float* const* exp_avgs,
                     float* const* exp_avg_sqs, const int64_t* sizes, const float* scalars, double* sums, int num_threads) {
    if (!fdk::given_tensors(n, sizes, params, grads, exp_avgs, exp_avg_sqs) || !fdk::given(n > 0, scalars, sums)) return 1;
    return fdk::guarded([&] {
        sum_blocks(n, sizes, 2, sums, num_threads, [&](const Block& b, double* out) {
            const int64_t k = b.tensor;
            Lamb s;
            std::memcpy(&s, scalars + 9 * k, sizeof s);
            lamb_moments(params[k] + b.begin, grads[k] + b.begin, exp_avgs[k] + b.begin, exp_avg_sqs[k] + b.begin, b.count, s,
                         out);
        });
    });
}

// p <- p - step size * u with the same rows of scalars; then the followers as in fdk_adamw_ema.
int fdk_lamb(int64_t n, float* const* params, const float* const* exp_avgs, const float* const* exp_avg_sqs,
             float* const* teachers, uint16_t* const* copies, uint16_t* const* teacher_copies, const int64_t* sizes,
             const float* scalars, double momentum, int num_threads) {
    const fdk::Followers followers{teachers, copies, teacher_copies, momentum};
    if (!fdk::given_tensors(n, sizes, params, exp_avgs, exp_avg_sqs) || !fdk::given(n > 0, scalars) ||
        !followers.given(n, sizes))
        return 1;
    return fdk::guarded([&] {
        const std::vector<Block> blocks = fdk::cut(n, sizes);
        fdk::parallel_for_dynamic(static_cast<int64_t>(blocks.size()), num_threads, [&](int64_t i) {
            const Block& b = blocks[i];
            const int64_t k = b.tensor;
            Lamb s;
            std::memcpy(&s, scalars + 9 * k, sizeof s);
            lamb(params[k] + b.begin, exp_avgs[k] + b.begin, exp_avg_sqs[k] + b.begin, b.count, s);
            followers.follow(params[k], b);
        });
    });
}

}  // extern "C"
