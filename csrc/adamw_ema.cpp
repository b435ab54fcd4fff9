// Multi-tensor updates of fp32 tensors: gradient norms, AdamW + clipping + teacher EMA in one pass, EMA alone.

#include "updates.h"

#include <cmath>

#include "check.h"
#include "parallel.h"
#include "simd.h"

namespace {

// Squares of fp32 numbers neither overflow nor vanish in double, so the sum is finite exactly if all elements are.
FDK_CLONES double sum_of_squares(const float* x, int64_t n) {
    double lanes[32] = {};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; ++j) lanes[j] += static_cast<double>(x[i + j]) * x[i + j];
    for (; i < n; ++i) lanes[i % 32] += static_cast<double>(x[i]) * x[i];
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
}

struct Scalars {  // one row of the `scalars` argument of fdk_adamw_ema
    float grad_factor, decay, step_size, inv_sqrt_correction2, beta1_rest, beta2, beta2_rest, eps;
};

FDK_CLONES void adamw(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
                      const Scalars& scalars) {
    const Scalars s = scalars;
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * s.grad_factor;
        m[i] += s.beta1_rest * (grad - m[i]);
        v[i] = s.beta2 * v[i] + s.beta2_rest * (grad * grad);
        p[i] = s.decay * p[i] - s.step_size * (m[i] / (std::sqrt(v[i]) * s.inv_sqrt_correction2 + s.eps));
    }
}

FDK_CLONES void ema_f32(float* __restrict t, const float* __restrict p, int64_t n, float keep, float rest) {
    for (int64_t i = 0; i < n; ++i) t[i] = keep * t[i] + rest * p[i];
}

FDK_CLONES void ema_bf16(float* __restrict t, const uint16_t* __restrict p, int64_t n, float keep, float rest) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        t[i] = keep * t[i] + rest * value;
    }
}

// Half to float by integer arithmetic: subnormals are scaled by a multiplication, infinities and NaN get the top exponent.
FDK_CLONES void ema_f16(float* __restrict t, const uint16_t* __restrict p, int64_t n, float keep, float rest) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t h = p[i], magnitude = (h & 0x7fffu) << 13, special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
        float value;
        std::memcpy(&value, &magnitude, sizeof value);
        value *= 0x1p112f;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits |= special | (h & 0x8000u) << 16;
        std::memcpy(&value, &bits, sizeof value);
        t[i] = keep * t[i] + rest * value;
    }
}

// Rounded to nearest even; NaN stays NaN.
FDK_CLONES void to_bf16(uint16_t* __restrict out, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &x[i], sizeof bits);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

// A momentum of 1 changes no byte.
void ema(float* t, const void* p, int dtype, int64_t begin, int64_t n, double momentum) {
    const float keep = static_cast<float>(momentum), rest = static_cast<float>(1 - momentum);
    if (rest == 0) return;
    if (dtype == 0) ema_f32(t + begin, static_cast<const float*>(p) + begin, n, keep, rest);
    if (dtype == 1) ema_bf16(t + begin, static_cast<const uint16_t*>(p) + begin, n, keep, rest);
    if (dtype == 2) ema_f16(t + begin, static_cast<const uint16_t*>(p) + begin, n, keep, rest);
}

}  // namespace

namespace fdk {

std::vector<Block> cut(int64_t n, const int64_t* sizes) {
    size_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += (sizes[i] + kBlock - 1) / kBlock;
    std::vector<Block> blocks;
    blocks.reserve(count);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t begin = 0; begin < sizes[i]; begin += kBlock)
            blocks.push_back({i, begin, sizes[i] - begin < kBlock ? sizes[i] - begin : kBlock});
    return blocks;
}

bool Followers::given(int64_t n, const int64_t* sizes) const {
    if (!fdk::given(n > 0, teachers, copies, teacher_copies)) return false;
    for (int64_t i = 0; i < n; ++i)
        if (sizes[i] > 0 && teacher_copies[i] != nullptr && teachers[i] == nullptr) return false;
    return true;
}

void Followers::follow(const float* param, const Block& b) const {
    float* const teacher = teachers[b.tensor];
    if (teacher) ema(teacher, param, 0, b.begin, b.count, momentum);
    if (copies[b.tensor]) to_bf16(copies[b.tensor] + b.begin, param + b.begin, b.count);
    if (teacher_copies[b.tensor]) to_bf16(teacher_copies[b.tensor] + b.begin, teacher + b.begin, b.count);
}

}  // namespace fdk

using fdk::Block;
using fdk::cut;

extern "C" {

// squares[i] = sum of squares of grads[i]: NaN or infinite exactly if an element is.
int fdk_sums_of_squares(int64_t n, const float* const* grads, const int64_t* sizes, double* squares, int num_threads) {
    if (!fdk::given_tensors(n, sizes, grads) || !fdk::given(n > 0, squares)) return 1;
    return fdk::guarded([&] {
        const std::vector<Block> blocks = cut(n, sizes);
        std::vector<double> partial(blocks.size());
        fdk::parallel_for_dynamic(static_cast<int64_t>(blocks.size()), num_threads, [&](int64_t i) {
            const Block& b = blocks[i];
            partial[i] = sum_of_squares(grads[b.tensor] + b.begin, b.count);
        });
        for (int64_t i = 0; i < n; ++i) squares[i] = 0;
        for (size_t i = 0; i < blocks.size(); ++i) squares[blocks[i].tensor] += partial[i];
    });
}

// For each tensor AdamW with its row of scalars [n, 8]: grad factor (clip / scale), 1 - lr * decay, lr / (1 - beta1^step),
// 1 / sqrt(1 - beta2^step), 1 - beta1, beta2, 1 - beta2, eps; then, where teachers[i] is not null,
// teacher <- momentum * teacher + (1 - momentum) * the new value; where copies[i] or teacher_copies[i] is not null, that
// value in bf16.
int fdk_adamw_ema(int64_t n, float* const* params, const float* const* grads, float* const* exp_avgs, float* const* exp_avg_sqs,
                  float* const* teachers, uint16_t* const* copies, uint16_t* const* teacher_copies, const int64_t* sizes,
                  const float* scalars, double momentum, int num_threads) {
    const fdk::Followers followers{teachers, copies, teacher_copies, momentum};
    if (!fdk::given_tensors(n, sizes, params, grads, exp_avgs, exp_avg_sqs) || !fdk::given(n > 0, scalars) ||
        !followers.given(n, sizes))
        return 1;
    return fdk::guarded([&] {
        const std::vector<Block> blocks = cut(n, sizes);
        fdk::parallel_for_dynamic(static_cast<int64_t>(blocks.size()), num_threads, [&](int64_t i) {
            const Block& b = blocks[i];
            const int64_t k = b.tensor;
            Scalars s;
            std::memcpy(&s, scalars + 8 * k, sizeof s);
            adamw(params[k] + b.begin, grads[k] + b.begin, exp_avgs[k] + b.begin, exp_avg_sqs[k] + b.begin, b.count, s);
            followers.follow(params[k], b);
        });
    });
}

// teachers[i] <- momentum * teachers[i] + (1 - momentum) * students[i]; student dtypes: 0 fp32, 1 bf16, 2 fp16.
int fdk_ema(int64_t n, float* const* teachers, const void* const* students, const int* dtypes, const int64_t* sizes,
            double momentum, int num_threads) {
    if (!fdk::given_tensors(n, sizes, teachers, students) || !fdk::given(n > 0, dtypes)) return 1;
    for (int64_t i = 0; i < n; ++i)
        if (dtypes[i] < 0 || dtypes[i] > 2) return 1;
    return fdk::guarded([&] {
        const std::vector<Block> blocks = cut(n, sizes);
        fdk::parallel_for_dynamic(static_cast<int64_t>(blocks.size()), num_threads, [&](int64_t i) {
            const Block& b = blocks[i];
            ema(teachers[b.tensor], students[b.tensor], dtypes[b.tensor], b.begin, b.count, momentum);
        });
    });
}

}  // extern "C"
