// The steps of the multi-crop augmentation on one crop. kernels/fastdino_kernels/multicrop.py is the specification;
// every step here gives the same bytes. A crop in the making is three planes (R, G, B) of size * size bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fdk::crop {

// What the hand-written kernels may use; the rest is left to the compiler (FDK_CLONES).
enum Simd { kPlain, kAvx2, kAvx512 };  // kAvx512 includes BW, VL, VBMI and VNNI
Simd simd();
void limit_simd(Simd most);  // for tests of the lower levels

// Memory that grows to what the largest crop needs and stays with its thread.
template <class T>
class Buffer {
public:
    T* need(size_t count) {
        if (data_.size() < count) data_.resize(count);
        return data_.data();
    }

private:
    std::vector<T> data_;
};

struct Image {
    const uint8_t* pixels;  // [height][width][3]
    int64_t height, width;
};

// Sides of images and crops: exact in the parameters, which are floats, and three times it is an int.
constexpr int64_t kMostSide = 1 << 24;
inline bool is_side(int64_t length) { return 0 < length && length <= kMostSide; }

struct Box {
    int y, x, height, width;
};

// multicrop_resize.cpp: the box of the image, antialiased bicubic, to size x size; mirrored if flip.
void resize(const Image& image, const Box& box, int size, bool flip, uint8_t* planes);

// multicrop_color.cpp and multicrop_hue.cpp, in place; count is the number of pixels.
void brightness(uint8_t* planes, int64_t count, float factor);
void contrast(uint8_t* planes, int64_t count, float factor);
void saturation(uint8_t* planes, int64_t count, float factor);
void hue(uint8_t* planes, int64_t count, float turns);
void gray(uint8_t* planes, int64_t count);

// multicrop_blur.cpp, in place.
void gaussian_blur(uint8_t* planes, int size, float sigma);

// multicrop_lookup.cpp, tables of 256 items.
// bytes[i] = table[bytes[i]], if this processor does that fast; otherwise it does nothing and returns false.
bool remap(uint8_t* bytes, int64_t count, const uint8_t* table);
// out[i] = table[bytes[i]], items of 2 or 4 bytes.
void lookup(const uint8_t* bytes, int64_t count, const void* table, int item_size, void* out);

}  // namespace fdk::crop
