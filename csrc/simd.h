// Vector code that is written once and compiled for several processors.
//
// FDK_CLONES before a function makes GCC or clang compile it for the baseline, for AVX2 (x86-64-v3) and for AVX-512
// (x86-64-v4) and choose at load time. Only what is inlined into such a function is cloned with it, so helpers are
// FDK_INLINE and lambdas stay outside. Elsewhere (other processors, C libraries without ifunc) it is empty, and with
// -DFDK_CLONES= as well.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(FDK_CLONES) && defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FDK_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#endif
#ifndef FDK_CLONES
#define FDK_CLONES
#endif

#define FDK_INLINE inline __attribute__((always_inline))

namespace fdk {

// 16 lanes: one AVX-512 register, or two of AVX2, or four of the baseline; the compiler splits them.
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

}  // namespace fdk
