"""``python -m fastdino.evaluation throughput``: images per second of the forward pass (paper, Table 1)."""

from __future__ import annotations

import argparse

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Measure images per second of the forward pass, as in Table 1."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.set_defaults(weights="random")  # the rate does not depend on them
    parser.add_argument(
        "--batch_size_per_gpu", type=command.positive, help="images per pass (default: 128, on a CPU 8)"
    )
    parser.add_argument(
        "--image_size", type=command.positive, default=224, help="side in pixels (default: 224)"
    )
    parser.add_argument("--warmup", type=command.positive, help="passes before (default: 50, on a CPU 3)")
    parser.add_argument("--passes", type=command.positive, help="timed passes (default: 30, on a CPU 10)")
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
    import torch

    from fastdino.engine.build import hardware_dtype
    from fastdino.evaluation.paper import paper_figure
    from fastdino.evaluation.throughput import NAMES, images_per_second

    device = command.device(flags)
    gpu = device.type == "cuda"
    batch = flags.batch_size_per_gpu or (128 if gpu else 8)
    warmup, passes = flags.warmup or (50 if gpu else 3), flags.passes or (30 if gpu else 10)
    network = command.backbone(flags)
    name = command.network_name(network)
    figures, lines = {}, []
    for dtype in dict.fromkeys((torch.float32, hardware_dtype("auto", device))):
        rate = images_per_second(
            network,
            batch_size=batch,
            image_size=flags.image_size,
            dtype=dtype,
            device=device,
            warmup=warmup,
            passes=passes,
        )
        figures[f"img_s_{NAMES[dtype]}"] = rate
        lines.append(f"{name}, {NAMES[dtype]}: {rate:.1f} img/s")
    if len(figures) == 1:
        lines.append("bf16: not measured, this CPU does not compute in it")
    settings = {"image_size": flags.image_size, "batch": batch, "warmup": warmup, "passes": passes}
    known = paper_figure("throughput", "img_s_fp32", name, settings)
    if known is not None and flags.image_size == 224:
        lines.append(f"the paper's {known[0]:g} img/s are one V100's, 128 images per pass")
    place = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    size = f"{batch} images of {flags.image_size} pixels per pass"
    lines.append(f"{size}, {passes} passes after {warmup} to warm up, on {place}")
    return Result(figures=figures, lines=lines, settings=settings)
