"""Valid arguments for every C function of csrc/, made from a seed, in the order of the function."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from reliability.c_arguments import (
    Arguments,
    Buffer,
    Buffers,
    Choice,
    Draw,
    Number,
    Size,
    changed,
    out,
    out_like,
    strided,
)

BLOCK = 8192  # elements that a thread takes of a list of tensors (csrc/updates.h)
MATCHED = 1024  # columns of a record of the matched loss


def advise_huge_pages(r: Draw) -> Arguments:
    count = r.choice((0, 1, 4095, 4096, 70_000))
    return {"address": Buffer(array("B", bytes(count))), "bytes": Size(count)}


def _dino_shape(r: Draw) -> tuple[Arguments, int]:
    g = r.randint(1, 3)
    shape = {"images": Size(r.size(0, 5)), "views": Size(r.randint(max(2, g), 5)), "n_global": Size(g)}
    views = shape["views"].value
    return dict(shape), shape["images"].value * (2 * views + 3 * g + views * g)


def dino_state_size(r: Draw) -> Arguments:
    return _dino_shape(r)[0]


def dino_state_init(r: Draw) -> Arguments:
    shape, size = _dino_shape(r)
    return {**shape, "state": out("d", size)}


def dino_result(r: Draw) -> Arguments:
    shape, size = _dino_shape(r)
    return {**shape, "state": Buffer(r.doubles(size)), "result": out("d", 2)}


def _dino_logits(r: Draw) -> tuple[Arguments, int, int, int]:
    shape, size = _dino_shape(r)
    images, views, g = (x.value for x in shape.values())  # type: ignore[union-attr]
    columns, bf16 = r.columns(4096), r.randint(0, 1)
    strides = [columns + r.choice((0, 0, 3, 16)) for _ in range(2)]
    rows = views * images, g * images
    student, teacher = (r.data(strided(n, columns, s), bf16) for n, s in zip(rows, strides, strict=True))
    arguments: Arguments = {
        "student": student,
        "teacher": teacher,
        "center": Buffer(r.floats(columns)),
        **shape,
        "columns": Size(columns),
        "student_stride": Size(strides[0]),
        "teacher_stride": Size(strides[1]),
        "bf16": Choice(bf16),
        "student_temp": r.temp(),
        "teacher_temp": r.temp(),
    }
    return arguments, size, rows[0], columns


def dino_statistics(r: Draw) -> Arguments:
    arguments, size, *_ = _dino_logits(r)
    return {**arguments, "state": changed(r.doubles(size))}


def dino_gradient(r: Draw) -> Arguments:
    arguments, size, rows, columns = _dino_logits(r)
    bf16, stride = arguments["bf16"].value, columns + r.choice((0, 5))  # type: ignore[union-attr]
    result = out_like(strided(rows, columns, stride), bf16)
    result.fresh = stride == columns  # what lies between the rows stays
    arguments |= {"state": Buffer(r.positives(size, "d")), "grad_loss": Number(r.gauss(0, 1), False)}
    return {**arguments, "out": result, "out_stride": Size(stride)}


def _matched(r: Draw) -> tuple[Arguments, dict[str, Buffer]]:
    """Arguments by name, in no order; and the records of all blocks, of which the call's may be the last."""
    rows, teachers, targets = r.size(1, 20), r.size(1, 9), r.randint(1, 4)
    columns, bf16, first = r.columns(MATCHED), r.randint(0, 1), r.randint(0, 2)
    blocks = first + -(-columns // MATCHED) + r.randint(0, 1)
    student = r.data(rows * columns, bf16)
    student.written = True
    found: Arguments = {
        "student": student,
        "teacher": r.data(teachers * columns, bf16),
        "center": Buffer(r.floats(columns)),
        "match": Buffer(r.integers(rows * targets, -1, teachers - 1)),
        "rows": Size(rows),
        "teacher_rows": Size(teachers),
        "targets": Size(targets),
        "columns": Size(columns),
        "bf16": Choice(bf16),
        "student_temp": r.temp(),
        "teacher_temp": r.temp(),
        "weights": Buffer(array("f", bytes(4 * teachers * columns))),
        "first_block": Size(first),
        "blocks": Size(blocks),
    }
    shapes = {"student_parts": rows * blocks * (2 + targets), "teacher_parts": teachers * blocks * 3}
    return found, {name: Buffer(r.positives(size)) for name, size in shapes.items()}


def matched_statistics(r: Draw) -> Arguments:
    arguments, records = _matched(r)
    weights = arguments["weights"]
    assert isinstance(weights, Buffer)
    weights.written = weights.fresh = True
    return arguments | {name: changed(buffer.values) for name, buffer in records.items()}


def matched_combine(r: Draw) -> Arguments:
    rows, teachers, targets, blocks = r.size(1, 20), r.size(1, 9), r.randint(1, 4), r.randint(1, 3)
    return {
        "match": Buffer(r.integers(rows * targets, -1, teachers - 1)),
        "row_weight": Buffer(r.floats(rows)),
        "rows": Size(rows),
        "teacher_rows": Size(teachers),
        "targets": Size(targets),
        "blocks": Size(blocks),
        "student_temp": r.temp(),
        "teacher_temp": r.temp(),
        "student_parts": Buffer(r.floats(rows * blocks * (2 + targets))),
        "teacher_parts": Buffer(r.floats(teachers * blocks * 3)),
        "student_stats": out("f", 2 * rows),
        "teacher_stats": out("f", 2 * teachers),
        "entropies": out("d", teachers),
        "result": out("d", 2),
    }


def matched_gradient(r: Draw) -> Arguments:
    found, records = _matched(r)
    rows, teachers = (found[name].value for name in ("rows", "teacher_rows"))  # type: ignore[union-attr]
    found |= records | {"row_weight": Buffer(r.floats(rows))}
    found |= {
        "student_stats": Buffer(r.positives(2 * rows)),
        "teacher_stats": Buffer(r.positives(2 * teachers)),
    }
    order = """student weights match row_weight rows teacher_rows targets columns bf16 student_temp
    teacher_temp first_block blocks student_parts teacher_parts student_stats teacher_stats"""
    return {name: found[name] for name in order.split()}


def _logits(r: Draw, block: int = 4096) -> tuple[Buffer, Arguments, int, int]:
    rows, columns, bf16 = r.size(0, 20), r.columns(block), r.randint(0, 1)
    shape: Arguments = {"rows": Size(rows), "columns": Size(columns), "bf16": Choice(bf16), "temp": r.temp()}
    return r.data(rows * columns, bf16), shape, rows, columns


def soft_cross_entropy(r: Draw) -> Arguments:
    logits, shape, rows, columns = _logits(r)
    targets = Buffer(r.floats(rows * columns))
    results = {"losses": out("f", rows), "stats": out("f", 2 * rows)}
    return {"logits": logits, "targets": targets, **shape, **results}


def soft_cross_entropy_gradient(r: Draw) -> Arguments:
    logits, shape, rows, columns = _logits(r)
    targets, stats, grads = (Buffer(r.floats(n)) for n in (rows * columns, 2 * rows, rows))
    result = out(logits.values.typecode, rows * columns)
    return {"logits": logits, "targets": targets, "stats": stats, "grads": grads, **shape, "out": result}


def sinkhorn_columns(r: Draw) -> Arguments:
    logits, shape, _, columns = _logits(r, 512)
    return {"logits": logits, **shape, "out": out("d", columns)}


def sinkhorn_step(r: Draw) -> Arguments:
    logits, shape, _, columns = _logits(r)
    return {"logits": logits, "c": Buffer(r.doubles(columns)), **shape, "out": out("d", columns)}


def sinkhorn_targets(r: Draw) -> Arguments:
    logits, shape, rows, columns = _logits(r)
    bf16 = r.randint(0, 1)
    rest = {"out": out_like(rows * columns, bf16), "out_bf16": Choice(bf16)}
    return {"logits": logits, "c": Buffer(r.doubles(columns)), **shape, **rest}


def info_nce_fold(r: Draw) -> Arguments:
    logits, shape, rows, _ = _logits(r)
    logits.written, d = True, r.size(0, 40)
    return {
        "logits": logits,
        **shape,
        "write": Choice(r.randint(0, 1)),
        "max": changed(r.floats(rows)),
        "sum": changed(r.doubles(rows)),
        "mean": changed(r.floats(rows * d)),
        "d": Size(d),
    }


def normalize_weight(r: Draw) -> Arguments:
    k, d, bf16 = r.size(0, 70), r.size(0, 130), r.randint(0, 1)
    shape = {"k": Size(k), "d": Size(d), "bf16": Choice(bf16)}
    return {"v": Buffer(r.floats(k * d)), "g": Buffer(r.floats(k)), "out": out_like(k * d, bf16), **shape}


def normalize_weight_gradient(r: Draw) -> Arguments:
    k, d, bf16 = r.size(0, 70), r.size(0, 130), r.randint(0, 1)
    given = {"dw": r.data(k * d, bf16), "v": Buffer(r.floats(k * d)), "g": Buffer(r.floats(k))}
    shape = {"k": Size(k), "d": Size(d), "bf16": Choice(bf16)}
    return {**given, "dv": out("f", k * d), "dg": out("f", k), **shape}


def _sizes(r: Draw) -> array:
    return array("q", (r.columns(BLOCK) for _ in range(r.size(0, 6))))


def _tensors(sizes: array, make: Callable[[int], array], written: bool = False) -> Buffers:
    return Buffers([Buffer(make(n), written) for n in sizes])


def _followers(r: Draw, sizes: array) -> Arguments:
    teachers = [changed(r.floats(n)) if r.random() < 0.7 else None for n in sizes]
    copies = [out("H", n) if r.random() < 0.5 else None for n in sizes]
    teacher_copies = [
        out("H", n) if t is not None and r.random() < 0.5 else None
        for n, t in zip(sizes, teachers, strict=True)
    ]
    lists = {"teachers": teachers, "copies": copies, "teacher_copies": teacher_copies}
    return {name: Buffers(list(buffers)) for name, buffers in lists.items()}


def _update(r: Draw, names: str, written: str, scalars: int, follow: bool = True) -> Arguments:
    """n, the lists ``names`` (those in ``written`` change), followers, sizes, ``scalars`` for each tensor."""
    sizes = _sizes(r)
    lists = {name: _tensors(sizes, r.floats, name in written.split()) for name in names.split()}
    followers = _followers(r, sizes) if follow else {}
    rest: Arguments = {"sizes": Buffer(sizes)}
    if scalars:
        rest["scalars"] = Buffer(r.positives(scalars * len(sizes)))
    if follow:
        rest["momentum"] = Number(r.choice((0.0, 0.5, 0.996, 1.0)), False)
    return {"n": Size(len(sizes)), **lists, **followers, **rest}


def sums_of_squares(r: Draw) -> Arguments:
    arguments = _update(r, "grads", "", 0, follow=False)
    return {**arguments, "squares": out("d", arguments["n"].value)}  # type: ignore[union-attr]


def adamw_ema(r: Draw) -> Arguments:
    return _update(r, "params grads exp_avgs exp_avg_sqs", "params exp_avgs exp_avg_sqs", 8)


def ema(r: Draw) -> Arguments:
    sizes = _sizes(r)
    dtypes = r.integers(len(sizes), 0, 2, "i")
    students = [r.data(n, int(kind > 0)) for n, kind in zip(sizes, dtypes, strict=True)]
    lists = {"teachers": _tensors(sizes, r.floats, True), "students": Buffers(list(students))}
    momentum = Number(r.choice((0.0, 0.9, 1.0)), False)
    rest = {"dtypes": Buffer(dtypes), "sizes": Buffer(sizes), "momentum": momentum}
    return {"n": Size(len(sizes)), **lists, **rest}


def lars_sums(r: Draw) -> Arguments:
    arguments = _update(r, "params grads", "", 0, follow=False)
    return {**arguments, "sums": out("d", 3 * arguments["n"].value)}  # type: ignore[union-attr]


def lars(r: Draw) -> Arguments:
    return _update(r, "params grads buffers", "params buffers", 4)


def lamb_moments(r: Draw) -> Arguments:
    arguments = _update(r, "params grads exp_avgs exp_avg_sqs", "exp_avgs exp_avg_sqs", 9, follow=False)
    return {**arguments, "sums": out("d", 2 * arguments["n"].value)}  # type: ignore[union-attr]


def lamb(r: Draw) -> Arguments:
    return _update(r, "params exp_avgs exp_avg_sqs", "params", 9)


def top_k_add(r: Draw) -> Arguments:
    rows, columns, k = r.size(0, 12), r.columns(512), r.size(1, 40)
    stride, room = columns + r.choice((0, 7)), k + 32 + r.choice((0, 1, k))
    return {
        "scores": Buffer(r.floats(strided(rows, columns, stride))),
        "rows": Size(rows),
        "columns": Size(columns),
        "stride": Size(stride),
        "first": Size(r.choice((0, 5, (1 << 32) - columns))),
        "k": Size(k, "i"),
        "room": Size(room, "i"),
        "keys": changed(r.integers(rows * room, 0, (1 << 64) - 1, "Q")),
        "counts": changed(r.integers(rows, 0, room, "i")),
        "thresholds": changed(array("f", [-float("inf")] * rows)),
    }


def top_k_finish(r: Draw) -> Arguments:
    rows, wanted = r.size(0, 12), r.size(0, 20)
    room = wanted + r.size(0, 40)
    return {
        "rows": Size(rows),
        "wanted": Size(wanted),
        "room": Size(room, "i"),
        "keys": changed(r.integers(rows * room, 0, (1 << 64) - 1, "Q")),
        "counts": Buffer(r.integers(rows, wanted, room, "i")),
        "values": out("f", rows * wanted),
        "columns": out("q", rows * wanted),
    }


def class_votes(r: Draw) -> Arguments:
    rows, k, number = r.size(0, 20), r.size(0, 30), r.size(1, 12)
    ks = array("q", sorted(r.randint(0, k) for _ in range(r.size(0, 4))))
    return {
        "rows": Size(rows),
        "k": Size(k),
        "classes": Buffer(r.integers(rows * k, 0, number - 1)),
        "weights": Buffer(r.positives(rows * k, "d")),
        "truth": Buffer(r.integers(rows, -1, number - 1)),
        "number": Size(number),
        "ks": Buffer(ks),
        "n": Size(len(ks)),
        "ranks": out("q", rows * len(ks)),
    }


def _image(r: Draw) -> tuple[Buffer, int, int]:
    height, width = r.size(1, 70), r.size(1, 70)
    return Buffer(array("B", r.randbytes(3 * height * width))), height, width


def multicrop(r: Draw) -> Arguments:
    images = [_image(r) for _ in range(r.size(0, 4))]
    crops = array("i", (r.size(1, 66) for _ in range(r.size(0, 3))))
    rows = array("f")
    for _, height, width in images:
        for _ in crops:
            h, w = r.randint(1, height), r.randint(1, width)
            box = r.randint(0, height - h), r.randint(0, width - w), h, w
            factors = [r.uniform(0, 2) for _ in range(3)]
            colour = [r.randint(0, 1), *factors, r.uniform(-0.5, 0.5), r.randint(0, 23), r.randint(0, 1)]
            blur = r.choice((0.0, 0.1, 1.0, 2.0, 7.5, 100.0))
            rows.extend([*box, r.randint(0, 1), *colour, blur, r.randint(0, 1), 0, 0])
    item = r.choice((2, 4))
    code, n = {2: "H", 4: "I"}[item], len(images)
    return {
        "n": Size(n),
        "images": Buffers([image for image, _, _ in images]),
        "sizes": Buffer(array("i", [side for _, *sides in images for side in sides])),
        "views": Size(len(crops)),
        "params": Buffer(rows),
        "outs": Buffers([out(code, n * 3 * s * s) for s in crops]),
        "out_sizes": Buffer(crops),
        "table": Buffer(r.integers(768, 0, (1 << 8 * item) - 1, code)),
        "item_size": Choice(item),
    }


def multicrop_limit_simd(r: Draw) -> Arguments:
    return {"level": Choice(r.randint(0, 2))}


def resize_crop(r: Draw) -> Arguments:
    image, height, width = _image(r)
    size = array("i", (r.size(1, 70), r.size(1, 70)))
    shape = [r.randint(1, side) for side in size]
    corner = [r.randint(0, side - length) for side, length in zip(size, shape, strict=True)]
    item = r.choice((1, 2, 4))
    code = {1: "B", 2: "H", 4: "I"}[item]
    return {
        "image": image,
        "height": Size(height),
        "width": Size(width),
        "size": Buffer(size),
        "window": Buffer(array("i", [*corner, *shape])),
        "table": Buffer(r.integers(768, 0, (1 << 8 * item) - 1, code)),
        "item_size": Choice(item),
        "out": out(code, 3 * shape[0] * shape[1]),
    }


FUNCTIONS: dict[str, Callable[[Draw], Arguments]] = {
    f"fdk_{make.__name__}": make
    for make in (
        advise_huge_pages, dino_state_size, dino_state_init, dino_statistics, dino_result, dino_gradient,
        matched_statistics, matched_combine, matched_gradient, soft_cross_entropy,
        soft_cross_entropy_gradient, sinkhorn_columns, sinkhorn_step, sinkhorn_targets, info_nce_fold,
        normalize_weight, normalize_weight_gradient, sums_of_squares, adamw_ema, ema, lars_sums, lars,
        lamb_moments, lamb, top_k_add, top_k_finish, class_votes, multicrop, multicrop_limit_simd,
        resize_crop,
    )
}  # fmt: skip


def arguments_of(name: str, seed: int) -> Arguments:
    """Those of case ``seed`` of a function."""
    return FUNCTIONS[name](Draw(seed * 1000 + list(FUNCTIONS).index(name)))
