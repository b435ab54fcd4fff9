// What the C functions ask of their arguments before they touch memory, and what they return whatever happens inside:
// 0 done, 1 an argument that cannot be, 2 out of memory, 3 anything else. No exception leaves the library.
//
// A length of an array that the caller has made too short cannot be seen from here; all else can.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>
#include <stdexcept>

namespace fdk {

struct BadArgument {};  // thrown where only the loop over the data sees it

// An array of these extents may exist: none is negative, and their product, zeros counted as ones, is below the bytes
// that a process can address, so no index or size computed from them overflows.
inline bool fits(std::initializer_list<int64_t> extents) {
    constexpr int64_t kMost = int64_t{1} << 47;
    int64_t items = 1;
    for (const int64_t extent : extents)
        if (extent < 0 || __builtin_mul_overflow(items, extent > 1 ? extent : 1, &items) || items > kMost) return false;
    return true;
}

// Rows of `columns` items may lie `stride` items apart; 0 is one row that is seen many times.
inline bool fits_rows(int64_t rows, int64_t columns, int64_t stride) {
    return fits({rows, columns}) && fits({rows, stride});
}

// As rows that are written to must: they do not overlap.
inline bool fits_apart(int64_t rows, int64_t columns, int64_t stride) {
    return fits_rows(rows, columns, stride) && (rows <= 1 || stride >= columns);
}

// No pointer is null, or there is nothing to point to.
template <typename... T>
bool given(bool needed, const T*... pointers) {
    return !needed || (... && (pointers != nullptr));
}

inline bool is_flag(int value) { return value == 0 || value == 1; }

// Lists of n tensors with sizes[i] elements, whose addresses `lists` hold.
template <typename... T>
bool given_tensors(int64_t n, const int64_t* sizes, T* const*... lists) {
    if (!fits({n}) || !given(n > 0, sizes, lists...)) return false;
    for (int64_t i = 0; i < n; ++i)
        if (!fits({sizes[i]}) || !given(sizes[i] > 0, lists[i]...)) return false;
    return true;
}

// f() with its exceptions as return codes.
template <typename F>
int guarded(const F& f) {
    try {
        f();
        return 0;
    } catch (const BadArgument&) {
        return 1;
    } catch (const std::bad_alloc&) {
        return 2;
    } catch (const std::length_error&) {  // a vector longer than memory
        return 2;
    } catch (...) {
        return 3;
    }
}

}  // namespace fdk
