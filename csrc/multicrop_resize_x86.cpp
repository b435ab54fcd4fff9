// The passes of the resize for AVX2 and AVX-512. Weights have 24 bits with their sign, more than the multipliers of
// bytes and 16-bit numbers take, so they are cut into parts, each part is summed alone, and the sums are added up in the
// end. All of it is exact modulo 2**32, and the total fits.

#include "multicrop_resize.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define FDK_AVX2 __attribute__((target("avx2")))
#define FDK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

namespace fdk::crop {
namespace {

constexpr int kHalf = 1 << (kBits - 1);

int pair(int low, int high) { return static_cast<int>((static_cast<uint32_t>(high) << 16) | (low & 0xffff)); }

// value = d[0] + 256 d[1] + 65536 d[2], each in -128 ... 127: normalised bicubic weights stay below 1.2 * 2**22.
void digits(int value, int d[3]) {
    for (int i = 0; i < 2; ++i) {
        d[i] = static_cast<int8_t>(value & 255);
        value = (value - d[i]) >> 8;
    }
    d[2] = value;
}

// Where 16 neighbouring outputs find their taps. The digits of the taps' weights follow: for every four taps three
// times 64 bytes, digit by digit, four bytes for each output.
struct alignas(64) Block {
    uint8_t index[64];  // bytes from pixel `base`: four taps of each output, channel 0
    int base, groups;   // first pixel of all outputs; number of fours of taps
};

constexpr int kReach = 128;  // bytes that a block sees at once: two registers

size_t block_bytes(const Weights& w) { return sizeof(Block) + static_cast<size_t>(w.taps) / 4 * 3 * 64; }

}  // namespace

// --- AVX2: 16-bit multipliers; weight = 256 * high + low, low in 0 ... 255; taps in pairs ----------------------------

// words[(o * taps / 2 + t / 2) * 2 ...]: high parts of taps t and t + 1, then their low parts.
void pack_pairs(const Weights& w, Packed& packed) {
    const size_t count = static_cast<size_t>(w.size) * w.taps;
    int* words = packed.words = packed.words_memory.need(count);
    for (size_t i = 0; i < count; i += 2) {
        words[i] = pair(w.value[i] >> 8, w.value[i + 1] >> 8);
        words[i + 1] = pair(w.value[i] & 255, w.value[i + 1] & 255);
    }
}

// Two rows at a time, one in each half of a register. Four taps of one output are 12 bytes of a row.
FDK_AVX2 void across_avx2(const uint8_t* const* rows, int count, const Weights& w, const Packed& packed, int pitch,
                          uint8_t* lines) {
    const char z = -1;
    const __m128i taps01 = _mm_setr_epi8(0, z, 3, z, 1, z, 4, z, 2, z, 5, z, z, z, z, z);  // R R G G B B as 16-bit
    const __m128i taps23 = _mm_setr_epi8(6, z, 9, z, 7, z, 10, z, 8, z, 11, z, z, z, z, z);
    const __m128i planes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i first_pair = _mm256_broadcastsi128_si256(taps01), second_pair = _mm256_broadcastsi128_si256(taps23);
    const __m256i planar = _mm256_broadcastsi128_si256(planes);
    const __m256i half = _mm256_set1_epi32(kHalf);
    for (int y = 0; y < count; y += 2) {
        const int next = std::min(y + 1, count - 1);
        const uint8_t *top = rows[y], *bottom = rows[next];
        uint8_t* top_line = lines + static_cast<size_t>(y) * 3 * pitch;
        uint8_t* bottom_line = lines + static_cast<size_t>(next) * 3 * pitch;
        for (int o = 0; o < w.size; o += 4) {
            __m256i sums[4];  // R, G, B, 0 of each row
            for (int j = 0; j < 4; ++j) {
                const int at = std::min(o + j, w.size - 1);
                const int* k = packed.words + static_cast<size_t>(at) * w.taps;
                const uint8_t *p = top + 3 * w.first[at], *q = bottom + 3 * w.first[at];
                __m256i high = _mm256_setzero_si256(), low = half;
                for (int t = 0; t < w.count[at]; t += 4, k += 4, p += 12, q += 12) {
                    const __m256i both = _mm256_inserti128_si256(
                        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                        _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)), 1);
                    const __m256i a = _mm256_shuffle_epi8(both, first_pair), b = _mm256_shuffle_epi8(both, second_pair);
                    high = _mm256_add_epi32(high, _mm256_madd_epi16(a, _mm256_set1_epi32(k[0])));
                    low = _mm256_add_epi32(low, _mm256_madd_epi16(a, _mm256_set1_epi32(k[1])));
                    high = _mm256_add_epi32(high, _mm256_madd_epi16(b, _mm256_set1_epi32(k[2])));
                    low = _mm256_add_epi32(low, _mm256_madd_epi16(b, _mm256_set1_epi32(k[3])));
                }
                sums[j] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, 8), low), kBits);
            }
            const __m256i low = _mm256_packs_epi32(sums[0], sums[1]), high = _mm256_packs_epi32(sums[2], sums[3]);
            const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(low, high), planar);
            alignas(32) uint8_t four[32];
            _mm256_store_si256(reinterpret_cast<__m256i*>(four), bytes);
            for (int c = 0; c < 3; ++c) {  // up to three bytes beyond size, inside pitch
                std::memcpy(top_line + c * pitch + o, four + 4 * c, 4);
                std::memcpy(bottom_line + c * pitch + o, four + 16 + 4 * c, 4);
            }
        }
    }
}

namespace {

// 16 bytes of an output line.
FDK_AVX2 inline void down_16(const uint8_t* const* rows, const int* k, int count, ptrdiff_t at, uint8_t* line) {
    __m256i high[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i low[2] = {_mm256_set1_epi32(kHalf), _mm256_set1_epi32(kHalf)};
    for (int t = 0; t < count; t += 2, k += 2) {
        const uint8_t *p = rows[t] + at, *q = rows[std::min(t + 1, count - 1)] + at;  // the weight beyond is zero
        const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
        const __m256i pairs[2] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)};
        const __m256i k_high = _mm256_set1_epi32(k[0]), k_low = _mm256_set1_epi32(k[1]);
        for (int i = 0; i < 2; ++i) {
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(pairs[i], k_high));
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(pairs[i], k_low));
        }
    }
    __m256i sums[2];
    for (int i = 0; i < 2; ++i)
        sums[i] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high[i], 8), low[i]), kBits);
    const __m256i words = _mm256_packs_epi32(sums[0], sums[1]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(line + at),
                     _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

}  // namespace

FDK_AVX2 void down_avx2(const uint8_t* const* rows, const Weights& w, const Packed& packed, int o, int bytes,
                        uint8_t* line) {
    const int* k = packed.words + static_cast<size_t>(o) * w.taps;
    rows += w.first[o];
    for (ptrdiff_t at = 0; at < bytes; at += 16) down_16(rows, k, w.count[o], at, line);
}

// --- AVX-512 VNNI: byte multipliers; weight = three digits; taps in fours --------------------------------------------

bool pack_blocks(const Weights& w, Packed& packed) {
    const size_t bytes = block_bytes(w);
    const auto start = reinterpret_cast<uintptr_t>(packed.blocks_memory.need(bytes * ((w.size + 15) / 16) + 64));
    packed.blocks = reinterpret_cast<uint8_t*>((start + 63) / 64 * 64);
    uint8_t* memory = packed.blocks;
    for (int begin = 0; begin < w.size; begin += 16, memory += bytes) {
        Block& block = *reinterpret_cast<Block*>(memory);
        const int end = std::min(begin + 16, w.size);
        block.base = *std::min_element(w.first + begin, w.first + end);
        block.groups = (*std::max_element(w.count + begin, w.count + end) + 3) / 4;
        int8_t* parts = reinterpret_cast<int8_t*>(memory + sizeof(Block));
        std::memset(block.index, 0, sizeof block.index);
        std::memset(parts, 0, static_cast<size_t>(block.groups) * 3 * 64);
        for (int o = begin; o < end; ++o) {
            const int lane = o - begin, offset = w.first[o] - block.base;
            if (3 * (offset + 3) >= kReach) return false;
            for (int t = 0; t < 4; ++t) block.index[4 * lane + t] = static_cast<uint8_t>(3 * (offset + t));
            for (int t = 0; t < w.count[o]; ++t) {
                int d[3];
                digits(w.value[static_cast<size_t>(o) * w.taps + t], d);
                for (int i = 0; i < 3; ++i) parts[(t / 4 * 3 + i) * 64 + 4 * lane + t % 4] = static_cast<int8_t>(d[i]);
            }
        }
    }
    return true;
}

FDK_AVX512 void across_avx512(const uint8_t* const* rows, int count, const Weights& w, const Packed& packed, int pitch,
                              uint8_t* lines) {
    const size_t bytes = block_bytes(w);
    for (int y = 0; y < count; ++y, lines += 3 * static_cast<size_t>(pitch)) {
        const uint8_t* memory = packed.blocks;
        for (int begin = 0; begin < w.size; begin += 16, memory += bytes) {
            const Block& block = *reinterpret_cast<const Block*>(memory);
            const __m512i index = _mm512_load_si512(block.index);
            const uint8_t* p = rows[y] + 3 * block.base;
            const uint8_t* parts = memory + sizeof(Block);
            __m512i sums[3][3];
            for (int c = 0; c < 3; ++c) {
                sums[c][0] = _mm512_set1_epi32(kHalf);
                sums[c][1] = sums[c][2] = _mm512_setzero_si512();
            }
            for (int g = 0; g < block.groups; ++g, p += 12, parts += 3 * 64) {
                const __m512i k0 = _mm512_load_si512(parts), k1 = _mm512_load_si512(parts + 64);
                const __m512i k2 = _mm512_load_si512(parts + 128);
                for (int c = 0; c < 3; ++c) {
                    const __m512i near = _mm512_loadu_si512(p + c), far = _mm512_loadu_si512(p + c + 64);
                    const __m512i taps = _mm512_permutex2var_epi8(near, index, far);
                    sums[c][0] = _mm512_dpbusd_epi32(sums[c][0], taps, k0);
                    sums[c][1] = _mm512_dpbusd_epi32(sums[c][1], taps, k1);
                    sums[c][2] = _mm512_dpbusd_epi32(sums[c][2], taps, k2);
                }
            }
            for (int c = 0; c < 3; ++c) {
                __m512i sum = _mm512_add_epi32(sums[c][0], _mm512_slli_epi32(sums[c][1], 8));
                sum = _mm512_srai_epi32(_mm512_add_epi32(sum, _mm512_slli_epi32(sums[c][2], 16)), kBits);
                sum = _mm512_max_epi32(sum, _mm512_setzero_si512());
                _mm_storeu_si128(reinterpret_cast<__m128i*>(lines + c * pitch + begin), _mm512_cvtusepi32_epi8(sum));
            }
        }
    }
}

// words[(o * taps / 4 + t / 4) * 3 + i]: digit i of the four taps from t.
void pack_digits(const Weights& w, Packed& packed) {
    const size_t count = static_cast<size_t>(w.size) * w.taps;
    int* words = packed.words = packed.words_memory.need(count / 4 * 3);
    for (size_t i = 0; i < count; i += 4, words += 3) {
        int8_t bytes[3][4];
        for (int t = 0; t < 4; ++t) {
            int d[3];
            digits(w.value[i + t], d);
            for (int j = 0; j < 3; ++j) bytes[j][t] = static_cast<int8_t>(d[j]);
        }
        std::memcpy(words, bytes, sizeof bytes);
    }
}

FDK_AVX512 void down_avx512(const uint8_t* const* rows, const Weights& w, const Packed& packed, int o, int bytes,
                            uint8_t* line) {
    const int* words = packed.words + static_cast<size_t>(o) * w.taps / 4 * 3;
    const int count = w.count[o];
    rows += w.first[o];
    for (ptrdiff_t at = 0; at < bytes; at += 64) {
        __m512i sums[4][3];
        for (int i = 0; i < 4; ++i) {
            sums[i][0] = _mm512_set1_epi32(kHalf);
            sums[i][1] = sums[i][2] = _mm512_setzero_si512();
        }
        const int* k = words;
        for (int t = 0; t < count; t += 4, k += 3) {
            const uint8_t* p[4];
            for (int j = 0; j < 4; ++j) p[j] = rows[std::min(t + j, count - 1)] + at;  // the weights beyond are zero
            const __m512i a = _mm512_loadu_si512(p[0]), b = _mm512_loadu_si512(p[1]);
            const __m512i c = _mm512_loadu_si512(p[2]), d = _mm512_loadu_si512(p[3]);
            const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
            const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
            const __m512i taps[4] = {_mm512_unpacklo_epi16(ab0, cd0), _mm512_unpackhi_epi16(ab0, cd0),
                                     _mm512_unpacklo_epi16(ab1, cd1), _mm512_unpackhi_epi16(ab1, cd1)};
            const __m512i k0 = _mm512_set1_epi32(k[0]), k1 = _mm512_set1_epi32(k[1]), k2 = _mm512_set1_epi32(k[2]);
            for (int i = 0; i < 4; ++i) {
                sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], taps[i], k0);
                sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], taps[i], k1);
                sums[i][2] = _mm512_dpbusd_epi32(sums[i][2], taps[i], k2);
            }
        }
        __m512i total[4];
        for (int i = 0; i < 4; ++i) {
            const __m512i sum = _mm512_add_epi32(sums[i][0], _mm512_slli_epi32(sums[i][1], 8));
            total[i] = _mm512_srai_epi32(_mm512_add_epi32(sum, _mm512_slli_epi32(sums[i][2], 16)), kBits);
        }
        const __m512i low = _mm512_packs_epi32(total[0], total[1]), high = _mm512_packs_epi32(total[2], total[3]);
        _mm512_storeu_si512(line + at, _mm512_packus_epi16(low, high));
    }
}

}  // namespace fdk::crop

#endif  // __x86_64__
