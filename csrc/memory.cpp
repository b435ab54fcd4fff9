// Fresh large buffers: the first touch of each 4 KB page costs more than a kernel's work on it, 2 MB pages cost 500 times fewer.

#include <cstdint>

#include "check.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Asks for huge pages under [address, address + bytes). Only advice: the contents never change, and refusal is no error.
extern "C" int fdk_advise_huge_pages(void* address, int64_t bytes, int) {
    if (!fdk::fits({bytes}) || !fdk::given(bytes > 0, address)) return 1;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, start = reinterpret_cast<uintptr_t>(address);
    const uintptr_t begin = (start + page - 1) / page * page, end = (start + static_cast<uintptr_t>(bytes)) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
#endif
    return 0;
}
