// Tables of 256 items: out[i] = table[bytes[i]].
//
// AVX-512 VBMI looks 64 bytes up in a table of 128; two of those and a choice by the highest bit make 256. Wider items
// are looked up byte by byte and interleaved.

#include <cstring>

#include "multicrop.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define FDK_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))
#endif

namespace fdk::crop {
namespace {

template <class Item>
void lookup_plain(const uint8_t* bytes, int64_t count, const Item* table, Item* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = table[bytes[i]];
}

#if defined(__x86_64__)

struct Table {
    __m512i part[4];
};

FDK_VBMI inline Table load_table(const uint8_t* table) {
    return {{_mm512_loadu_si512(table), _mm512_loadu_si512(table + 64), _mm512_loadu_si512(table + 128),
             _mm512_loadu_si512(table + 192)}};
}

FDK_VBMI inline __m512i find(const Table& t, __m512i index) {
    const __m512i low = _mm512_permutex2var_epi8(t.part[0], index, t.part[1]);
    const __m512i high = _mm512_permutex2var_epi8(t.part[2], index, t.part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

// Byte number `byte` of every item of the table.
template <class Item>
FDK_VBMI inline Table load_plane(const Item* table, int byte) {
    uint8_t plane[256];
    for (int v = 0; v < 256; ++v) plane[v] = static_cast<uint8_t>(table[v] >> (8 * byte));
    return load_table(plane);
}

// These do the first count / 64 * 64 bytes and return how many that is.

FDK_VBMI int64_t remap_vbmi(uint8_t* bytes, int64_t count, const uint8_t* table) {
    const Table t = load_table(table);
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) _mm512_storeu_si512(bytes + i, find(t, _mm512_loadu_si512(bytes + i)));
    return i;
}

FDK_VBMI int64_t lookup_vbmi(const uint8_t* bytes, int64_t count, const uint16_t* table, uint16_t* out) {
    const Table t0 = load_plane(table, 0), t1 = load_plane(table, 1);
    // Interleaving works in lanes of 16 bytes: lane k gets the eights number k and k + 4, so that the low halves give
    // the first 32 items and the high halves the last.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
        const __m512i index = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(bytes + i));
        const __m512i b0 = find(t0, index), b1 = find(t1, index);
        _mm512_storeu_si512(out + i, _mm512_unpacklo_epi8(b0, b1));
        _mm512_storeu_si512(out + i + 32, _mm512_unpackhi_epi8(b0, b1));
    }
    return i;
}

FDK_VBMI int64_t lookup_vbmi(const uint8_t* bytes, int64_t count, const uint32_t* table, uint32_t* out) {
    const Table t0 = load_plane(table, 0), t1 = load_plane(table, 1);
    const Table t2 = load_plane(table, 2), t3 = load_plane(table, 3);
    // As above with fours: lane k gets the fours number k, k + 4, k + 8 and k + 12.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
        const __m512i index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(bytes + i));
        const __m512i b0 = find(t0, index), b1 = find(t1, index), b2 = find(t2, index), b3 = find(t3, index);
        const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), low23 = _mm512_unpacklo_epi8(b2, b3);
        const __m512i high01 = _mm512_unpackhi_epi8(b0, b1), high23 = _mm512_unpackhi_epi8(b2, b3);
        _mm512_storeu_si512(out + i, _mm512_unpacklo_epi16(low01, low23));
        _mm512_storeu_si512(out + i + 16, _mm512_unpackhi_epi16(low01, low23));
        _mm512_storeu_si512(out + i + 32, _mm512_unpacklo_epi16(high01, high23));
        _mm512_storeu_si512(out + i + 48, _mm512_unpackhi_epi16(high01, high23));
    }
    return i;
}

#endif

template <class Item>
void lookup_items(const uint8_t* bytes, int64_t count, const void* table, void* out) {
    Item items[256];
    std::memcpy(items, table, sizeof items);
    int64_t done = 0;
#if defined(__x86_64__)
    if (simd() == kAvx512) done = lookup_vbmi(bytes, count, items, static_cast<Item*>(out));
#endif
    lookup_plain(bytes + done, count - done, items, static_cast<Item*>(out) + done);
}

}  // namespace

bool remap([[maybe_unused]] uint8_t* bytes, [[maybe_unused]] int64_t count, [[maybe_unused]] const uint8_t* table) {
#if defined(__x86_64__)
    if (simd() == kAvx512) {
        const int64_t done = remap_vbmi(bytes, count, table);
        lookup_plain(bytes + done, count - done, table, bytes + done);
        return true;
    }
#endif
    return false;
}

void lookup(const uint8_t* bytes, int64_t count, const void* table, int item_size, void* out) {
    if (item_size == 2)
        lookup_items<uint16_t>(bytes, count, table, out);
    else
        lookup_items<uint32_t>(bytes, count, table, out);
}

}  // namespace fdk::crop
