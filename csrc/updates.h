// What the multi-tensor updates share: blocks of fixed size that threads take one by one, and what follows new parameters
// (the teacher's EMA and copies in bf16). A block's result does not depend on the thread, so the results are bitwise the
// same for any number of threads.
#pragma once

#include <cstdint>
#include <vector>

namespace fdk {

constexpr int64_t kBlock = 8192;  // elements: 32 KB of each stream, so what follows finds the new values in the cache

struct Block {
    int64_t tensor, begin, count;
};

std::vector<Block> cut(int64_t n, const int64_t* sizes);

// Followers of each tensor; null where there are none.
struct Followers {
    float* const* teachers;  // teacher <- momentum * teacher + (1 - momentum) * parameter
    uint16_t* const* copies;  // bf16 of the parameter
    uint16_t* const* teacher_copies;
    double momentum;

    bool given(int64_t n, const int64_t* sizes) const;  // the lists are there, and no copy of a teacher without one
    void follow(const float* param, const Block& block) const;  // param: the tensor's first element
};

}  // namespace fdk
