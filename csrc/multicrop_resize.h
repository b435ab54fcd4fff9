// Between multicrop_resize.cpp and its hand-written kernels in multicrop_resize_x86.cpp.
//
// The horizontal pass ("across") turns rows of interleaved RGB into lines of three planes: R, G and B, each `pitch` bytes,
// pitch = size rounded up to 16. The vertical pass ("down") makes the bytes of one output line from the same bytes of
// several input lines, whatever these hold. So either may come first.
#pragma once

#include "multicrop.h"

namespace fdk::crop {

constexpr int kBits = 22;  // weights are in units of 2**-kBits
constexpr size_t kSlack = 256;

// A resize to height x width, of which rows x columns pixels from (top, left) are wanted; mirrored if flip.
struct Target {
    int height, width, top, left, rows, columns;
    bool flip;
};

// The box of the image, antialiased bicubic, to the target: three planes of rows * columns bytes. Gives the bytes that a
// resize of everything has there, for less work.
void resize(const Image& image, const Box& box, const Target& target, uint8_t* planes);

// Weight of input first[o] + t in output o: value[o * taps + t] for t < count[o]; zero up to taps, a multiple of 4.
struct Weights {
    int size = 0, taps = 0;
    int *first = nullptr, *count = nullptr, *value = nullptr;

    // Of outputs begin ... begin + size - 1 of an axis that is resized from length to outputs.
    void compute(int length, int outputs, int begin, int size, bool reversed);

    // Takes the inputs that no output needs off the front; returns how many, and in `needed` how many are left but for
    // those at the end.
    int trim(int* needed);

private:
    Buffer<int> first_, count_, value_;
    Buffer<double> row_;
};

// The same in the form that the vector kernels read.
struct Packed {
    int* words = nullptr;       // by output
    uint8_t* blocks = nullptr;  // by 16 outputs, 64-byte aligned

    Buffer<int> words_memory;
    Buffer<uint8_t> blocks_memory;
};

// Both read the rows, and write the line, up to kSlack bytes beyond what they are about.
using Across = void (*)(const uint8_t* const* rows, int count, const Weights& w, const Packed& packed, int pitch,
                        uint8_t* lines);
using Down = void (*)(const uint8_t* const* rows, const Weights& w, const Packed& packed, int o, int bytes,
                      uint8_t* line);

#if defined(__x86_64__)
void pack_pairs(const Weights& w, Packed& packed);
void across_avx2(const uint8_t* const* rows, int count, const Weights& w, const Packed& packed, int pitch,
                 uint8_t* lines);
void down_avx2(const uint8_t* const* rows, const Weights& w, const Packed& packed, int o, int bytes, uint8_t* line);

bool pack_blocks(const Weights& w, Packed& packed);  // false: the outputs are too far apart for across_avx512
void across_avx512(const uint8_t* const* rows, int count, const Weights& w, const Packed& packed, int pitch,
                   uint8_t* lines);
void pack_digits(const Weights& w, Packed& packed);
void down_avx512(const uint8_t* const* rows, const Weights& w, const Packed& packed, int o, int bytes, uint8_t* line);
#endif

}  // namespace fdk::crop
