// Resize of a whole image of which only a window is computed: the view of an evaluation (shorter side to 256, center 224).

#include "check.h"
#include "multicrop_resize.h"

// image: [height][width][3] bytes; size: height and width of the resized image; window: top, left, rows, columns in it.
// out: [3][rows][columns], bytes if item_size is 1, else items of item_size (2 or 4) bytes from table, item [3][256].
// One image is one thread's work.
extern "C" int fdk_resize_crop(const uint8_t* image, int64_t height, int64_t width, const int32_t* size, const int32_t* window,
                               const void* table, int item_size, void* out, int) {
    using namespace fdk::crop;
    if ((item_size != 1 && item_size != 2 && item_size != 4) || !fdk::given(true, image, size, window, out) ||
        !fdk::given(item_size > 1, table) || !is_side(height) || !is_side(width))
        return 1;
    for (int axis = 0; axis < 2; ++axis) {
        const int64_t start = window[axis], length = window[2 + axis];
        if (!is_side(size[axis]) || start < 0 || length < 1 || start + length > size[axis]) return 1;
    }
    const Target target{size[0], size[1], window[0], window[1], window[2], window[3], false};
    const Box whole{0, 0, static_cast<int>(height), static_cast<int>(width)};
    const int64_t count = static_cast<int64_t>(target.rows) * target.columns;
    return fdk::guarded([&] {
        if (item_size == 1) {
            resize({image, height, width}, whole, target, static_cast<uint8_t*>(out));
            return;
        }
        static thread_local Buffer<uint8_t> memory;
        uint8_t* planes = memory.need(3 * count);
        resize({image, height, width}, whole, target, planes);
        for (int c = 0; c < 3; ++c)
            lookup(planes + c * count, count, static_cast<const uint8_t*>(table) + c * 256 * item_size, item_size,
                   static_cast<uint8_t*>(out) + c * count * item_size);
    });
}
