// out[i] = table[bytes[i]] for tables of 256 items of 2 or 4 bytes: the normalised value of every 8-bit value.

#include <cstring>

#include "multicrop.h"

namespace fdk::crop {
namespace {

template <class Item>
void lookup_plain(const uint8_t* bytes, int64_t count, const Item* table, Item* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = table[bytes[i]];
}

}  // namespace

void lookup(const uint8_t* bytes, int64_t count, const void* table, int item_size, void* out) {
    if (item_size == 2)
        lookup_plain(bytes, count, static_cast<const uint16_t*>(table), static_cast<uint16_t*>(out));
    else
        lookup_plain(bytes, count, static_cast<const uint32_t*>(table), static_cast<uint32_t*>(out));
}

}  // namespace fdk::crop
