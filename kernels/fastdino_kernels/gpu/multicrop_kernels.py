"""Kernels of the Triton form of multi-crop, with the integers and the roundings of its specification.

A program takes `BLOCK` outputs of one crop. Its entry in the table says which: the crop in the upper 32 bits,
the number of the block in the lower. A crop's row of the table holds addresses, offsets and parameters, in
the columns below. Images are interleaved as they come, all else is in planes.

All kernels are compiled without contraction of products and sums (`enable_fp_fusion=False`): a fused
multiply-add rounds once where the specification rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a crop's row, int64.
IMAGE = tl.constexpr(0)  # address of the box's first pixel
PITCH = tl.constexpr(1)  # bytes from one row of pixels to the next
SIZE = tl.constexpr(2)
OUT = tl.constexpr(3)  # address
TALL = tl.constexpr(4)  # 1: the first pass is the vertical one
LENGTHS = tl.constexpr(5)  # of the box: width, height
WEIGHTS = tl.constexpr(7)  # where those across and those down begin
TAPS = tl.constexpr(9)  # weights of one output, across and down
SPARE = tl.constexpr(11)  # scratch of the first resize pass, later of the blur: offset in bytes
PLANES = tl.constexpr(12)  # the crop, uint8 [3, S, S]: offset in bytes
FLIP = tl.constexpr(13)
ORDER = tl.constexpr(14)  # of the jitter's steps, two bits each: brightness, contrast, saturation, hue
BEFORE = tl.constexpr(15)  # steps that precede the contrast
STEPS = tl.constexpr(16)  # 4, or 0 without jitter
FACTORS = tl.constexpr(17)  # of the first three: bits of a float32
SHIFT = tl.constexpr(20)  # of the 8-bit hue
GRAY = tl.constexpr(21)
BLURRED = tl.constexpr(22)
RADIUS = tl.constexpr(23)  # of the box filter, and its weights in units of 2**-24
INNER = tl.constexpr(24)
OUTER = tl.constexpr(25)
SOLARIZE = tl.constexpr(26)
FIELDS = 27


@triton.jit
def _entry(table_ptr, start, FIELDS: tl.constexpr):
    """-> the crop, its row, the number of the block."""
    entry = tl.load(table_ptr + start + tl.program_id(0))
    crop = entry >> 32
    return crop, table_ptr + crop * FIELDS, entry.to(tl.int32)


@triton.jit
def _cubic(d):
    """Keys' cubic convolution with a = -1/2, fp64, d >= 0."""
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = (((d - 5.0) * d + 8.0) * d - 4.0) * -0.5
    return tl.where(d < 1.0, near, tl.where(d < 2.0, far, 0.0))


@triton.jit(do_not_specialize=["start"])
def _weights_kernel(
    table_ptr,
    weights_ptr,  # int32; of each crop and axis: first input [S], number of inputs [S], weights [TAPS, S]
    start,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, row, number = _entry(table_ptr, start, FIELDS)
    axis = number & 1
    size = tl.load(row + SIZE).to(tl.int32)
    length = tl.load(row + LENGTHS + axis).to(tl.int32)
    taps = tl.load(row + TAPS + axis).to(tl.int32)
    output = (number >> 1) * BLOCK + tl.arange(0, BLOCK)
    mask = output < size
    output = tl.minimum(output, size - 1)

    scale = length.to(tl.float64) / size.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    inverse = 1.0 / stretch
    center = (output.to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - 2.0 * stretch + 0.5).to(tl.int32), 0)  # truncated, as C does
    last = tl.minimum((center + 2.0 * stretch + 0.5).to(tl.int32), length)
    total = tl.zeros([BLOCK], tl.float64)
    for t in range(taps):
        d = tl.abs(((first + t).to(tl.float64) - center + 0.5) * inverse)
        total += tl.where(first + t < last, _cubic(d), 0.0)

    out = weights_ptr + tl.load(row + WEIGHTS + axis) + output
    tl.store(out, first, mask)
    tl.store(out + size, last - first, mask)
    for t in range(taps):
        d = tl.abs(((first + t).to(tl.float64) - center + 0.5) * inverse)
        scaled = tl.where(first + t < last, _cubic(d), 0.0) / total * 4194304.0
        value = tl.where(scaled < 0.0, scaled - 0.5, scaled + 0.5).to(tl.int32)
        tl.store(out + (2 + t) * size, value, mask)


@triton.jit
def _resample(source, channel, step, weights_ptr, output, row, axis, mask):
    """Red, green and blue of outputs number ``output`` along ``axis`` (0 across, 1 down).

    ``source`` points to input 0 of each; ``channel`` and ``step`` are the distances between channels and
    between inputs.
    """
    size = tl.load(row + SIZE).to(tl.int32)
    weights = weights_ptr + tl.load(row + WEIGHTS + axis) + output
    first = tl.load(weights, mask, 0)
    count = tl.load(weights + size, mask, 0)
    weights += 2 * size
    source += first * step
    red = tl.zeros_like(output) + (1 << 21)
    green = red
    blue = red
    for t in range(tl.load(row + TAPS + axis).to(tl.int32)):
        inside = t < count
        weight = tl.load(weights, inside, 0)
        red += weight * tl.load(source, inside, 0).to(tl.int32)
        green += weight * tl.load(source + channel, inside, 0).to(tl.int32)
        blue += weight * tl.load(source + 2 * channel, inside, 0).to(tl.int32)
        weights += size
        source += step
    return _to_byte(red), _to_byte(green), _to_byte(blue)


@triton.jit
def _to_byte(total):
    return tl.minimum(tl.maximum(total >> 22, 0), 255)


@triton.jit(do_not_specialize=["start"])
def _first_pass_kernel(
    table_ptr,
    weights_ptr,
    scratch_ptr,
    start,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The box resized along one axis, uint8 [3, height, S] or, of tall boxes, [3, S, width]."""
    _, row, number = _entry(table_ptr, start, FIELDS)
    tall = tl.load(row + TALL).to(tl.int32)
    size = tl.load(row + SIZE).to(tl.int32)
    pitch = tl.load(row + PITCH)
    rows = tl.where(tall != 0, size, tl.load(row + LENGTHS + 1).to(tl.int32))
    columns = tl.where(tall != 0, tl.load(row + LENGTHS).to(tl.int32), size)
    count = rows.to(tl.int64) * columns
    place = number * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    y = place // columns
    x = place % columns

    other = tl.where(tall != 0, 3 * x.to(tl.int64), y * pitch)
    source = tl.load(row + IMAGE).to(tl.pointer_type(tl.uint8)) + other
    step = tl.where(tall != 0, pitch, 3)
    output = tl.where(tall != 0, y, x)
    red, green, blue = _resample(source, 1, step, weights_ptr, output, row, tall, mask)
    out = scratch_ptr + tl.load(row + SPARE) + place
    tl.store(out, red.to(tl.uint8), mask)
    tl.store(out + count, green.to(tl.uint8), mask)
    tl.store(out + 2 * count, blue.to(tl.uint8), mask)


@triton.jit(do_not_specialize=["start"])
def _second_pass_kernel(
    table_ptr,
    weights_ptr,
    scratch_ptr,
    sums_ptr,  # int64 [crops], zeros: sum of the luma that the contrast is about
    start,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Along the other axis, flipped; then the steps of the jitter that precede the contrast."""
    crop, row, number = _entry(table_ptr, start, FIELDS)
    tall = tl.load(row + TALL).to(tl.int32)
    size = tl.load(row + SIZE).to(tl.int32)
    count = size.to(tl.int64) * size
    place = number * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    y = place // size
    x = place % size

    width = tl.load(row + LENGTHS)
    channel = size * tl.where(tall != 0, width, tl.load(row + LENGTHS + 1))
    other = tl.where(tall != 0, y * width, x.to(tl.int64))
    source = scratch_ptr + tl.load(row + SPARE) + other
    step = tl.where(tall != 0, 1, size)
    output = tl.where(tall != 0, x, y)
    red, green, blue = _resample(source, channel, step, weights_ptr, output, row, 1 - tall, mask)

    before = tl.load(row + BEFORE).to(tl.int32)
    red, green, blue = _jitter(red, green, blue, row, 0, 0, before)
    if tl.load(row + STEPS) != 0:
        luma = tl.where(mask, _luma(red, green, blue), 0)
        tl.atomic_add(sums_ptr + crop, tl.sum(luma).to(tl.int64), sem="relaxed")
    flip = tl.load(row + FLIP) != 0
    out = scratch_ptr + tl.load(row + PLANES) + y * size + tl.where(flip, size - 1 - x, x)
    tl.store(out, red.to(tl.uint8), mask)
    tl.store(out + count, green.to(tl.uint8), mask)
    tl.store(out + 2 * count, blue.to(tl.uint8), mask)


@triton.jit(do_not_specialize=["start"])
def _color_kernel(
    table_ptr,
    values_ptr,  # [3, 256]: what each 8-bit value becomes
    scratch_ptr,
    sums_ptr,
    start,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The contrast and the steps that follow it, gray; crops without blur are finished here."""
    crop, row, number = _entry(table_ptr, start, FIELDS)
    size = tl.load(row + SIZE).to(tl.int32)
    count = size.to(tl.int64) * size
    place = number * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    planes = scratch_ptr + tl.load(row + PLANES) + place
    red = tl.load(planes, mask, 0).to(tl.int32)
    green = tl.load(planes + count, mask, 0).to(tl.int32)
    blue = tl.load(planes + 2 * count, mask, 0).to(tl.int32)

    mean = (tl.load(sums_ptr + crop).to(tl.float64) / count.to(tl.float64) + 0.5).to(tl.int32)
    before, steps = tl.load(row + BEFORE).to(tl.int32), tl.load(row + STEPS).to(tl.int32)
    red, green, blue = _jitter(red, green, blue, row, mean, before, steps)
    if tl.load(row + GRAY) != 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    if tl.load(row + BLURRED) != 0:
        tl.store(planes, red.to(tl.uint8), mask)
        tl.store(planes + count, green.to(tl.uint8), mask)
        tl.store(planes + 2 * count, blue.to(tl.uint8), mask)
    else:
        _finish(red, 0, row, values_ptr, place, count, mask)
        _finish(green, 1, row, values_ptr, place, count, mask)
        _finish(blue, 2, row, values_ptr, place, count, mask)


@triton.jit(do_not_specialize=["start", "number"])
def _blur_kernel(
    table_ptr,
    values_ptr,
    scratch_ptr,
    start,
    number,  # of the pass: 0, 1, 2 across, 3, 4, 5 down; the last one finishes the crop
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One extended box filter along one axis, from the planes to the spare ones or back."""
    _, row, block = _entry(table_ptr, start, FIELDS)
    size = tl.load(row + SIZE).to(tl.int32)
    radius = tl.load(row + RADIUS).to(tl.int32)
    inner, outer = tl.load(row + INNER).to(tl.uint32), tl.load(row + OUTER).to(tl.uint32)
    count = size.to(tl.int64) * size
    place = block * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    y = place // size
    x = place % size
    down = number >= 3
    middle = tl.where(down, y, x)
    begin = tl.where(down, x, y * size)  # of the line
    step = tl.where(down, size, 1)

    planes, spare = tl.load(row + PLANES), tl.load(row + SPARE)
    even = number % 2 == 0
    for channel in range(3):
        source = scratch_ptr + tl.where(even, planes, spare) + channel * count + begin
        inside = tl.zeros([BLOCK], tl.uint32)
        for t in range(-radius, radius + 1):
            at = tl.minimum(tl.maximum(middle + t, 0), size - 1) * step
            inside += tl.load(source + at, mask, 0).to(tl.uint32)
        left = tl.maximum(middle - radius - 1, 0) * step
        right = tl.minimum(middle + radius + 1, size - 1) * step
        ends = tl.load(source + left, mask, 0).to(tl.uint32) + tl.load(source + right, mask, 0).to(tl.uint32)
        value = (inside * inner + ends * outer + (1 << 23)) >> 24  # below 2**32 at most
        if number == 5:
            _finish(value.to(tl.int32), channel, row, values_ptr, place, count, mask)
        else:
            target = scratch_ptr + tl.where(even, spare, planes) + channel * count + place
            tl.store(target, value.to(tl.uint8), mask)


@triton.jit
def _finish(value, channel, row, values_ptr, place, count, mask):
    """Solarize and normalise."""
    if tl.load(row + SOLARIZE) != 0:
        value = tl.where(value < 128, value, 255 - value)
    out = tl.load(row + OUT).to(tl.pointer_type(values_ptr.dtype.element_ty)) + channel * count + place
    tl.store(out, tl.load(values_ptr + channel * 256 + value, mask, 0), mask)


@triton.jit
def _luma(red, green, blue):
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@triton.jit
def _blend(base, value, factor):
    """base + factor * (value - base), clipped and truncated."""
    mixed = base + factor * (value.to(tl.float32) - base)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _jitter(red, green, blue, row, mean, first, last):
    """Steps ``first`` to ``last`` of the jitter in the crop's order, on int32 values of 0 to 255."""
    order = tl.load(row + ORDER).to(tl.int32)
    shift = tl.load(row + SHIFT).to(tl.int32)
    for step in range(first, last):
        operation = (order >> (2 * step)) & 3
        if operation == 3:
            red, green, blue = _hue(red, green, blue, shift)
        else:
            factor = tl.load(row + FACTORS + operation).to(tl.int32).to(tl.float32, bitcast=True)
            about = tl.where(operation == 1, mean, 0)
            base = tl.where(operation == 2, _luma(red, green, blue), about).to(tl.float32)
            red, green, blue = (
                _blend(base, red, factor),
                _blend(base, green, factor),
                _blend(base, blue, factor),
            )
    return red, green, blue


@triton.jit
def _hue(red, green, blue, shift):
    """To 8-bit HSV, hue + shift modulo 256, and back.

    The specification has float64 in places; the float32 used here gives the same bytes for each of the 2**24
    colours and 256 shifts.
    """
    top = tl.maximum(tl.maximum(red, green), blue)
    bottom = tl.minimum(tl.minimum(red, green), blue)
    chroma = top - bottom
    middle = red + green + blue - top - bottom

    # An odd number of sixths of a turn, plus or minus the share of the middle value in the chroma.
    red_top, green_top, blue_low = red == top, green == top, blue == bottom
    green_low = (green == bottom) & (blue != bottom)
    odd = tl.where(green_top, tl.where(blue_low, 1, 3), tl.where(green_low, 5, 3))
    odd = tl.where(red_top, tl.where(green_low, -1, 1), odd)
    plus = tl.where(red_top, green_low, tl.where(green_top, blue_low, green_low == 0))
    distance = tl.where(plus, top - middle, middle - top)
    angle = odd.to(tl.float32) + tl.div_rn(distance.to(tl.float32), tl.maximum(chroma, 1).to(tl.float32))
    sixth = tl.div_rn(angle, 6.0)
    turns = tl.where(angle < 0.0, sixth + 1.0, sixth)
    hue = (turns * 255.0).to(tl.int32)
    hue = (tl.where(chroma == 0, 0, hue) + shift) & 255
    saturation = tl.div_rn((chroma * 255).to(tl.float32), tl.maximum(top, 1).to(tl.float32)).to(tl.int32)

    # All are 255ths: the middle value is top * (1 - saturation * place), or with 1 - place, in the sector.
    sector = (hue * 1542 + 257) >> 16  # 6 * hue / 255: 0 ... 6, and 6 is 0 again
    rest = hue * 6 - sector * 255
    away = tl.where((sector & 1) != 0, rest, 255 - rest).to(tl.float32)
    value = top.to(tl.float32)
    product = value * saturation.to(tl.float32)
    low = (value + 0.5 - product * (1.0 / 255.0)).to(tl.int32)
    mid = (value + 0.5 - product * away * (1.0 / 65025.0)).to(tl.int32)
    red = tl.where((sector == 1) | (sector == 4), mid, tl.where((sector == 2) | (sector == 3), low, top))
    green = tl.where((sector == 1) | (sector == 2), top, low)
    green = tl.where((sector == 0) | (sector == 3) | (sector == 6), mid, green)
    blue = tl.where((sector == 2) | (sector == 5), mid, tl.where((sector == 3) | (sector == 4), top, low))
    return red, green, blue
