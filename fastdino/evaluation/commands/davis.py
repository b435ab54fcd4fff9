"""``python -m fastdino.evaluation davis``, after the official ``eval_video_segmentation.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

if TYPE_CHECKING:
    from fastdino.evaluation.davis import Video
    from fastdino.evaluation.segmentation_metrics import SequenceScores

HELP = "Video object segmentation on DAVIS 2017: the first frame's mask carried along by features."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path",
        metavar="DIR",
        required=True,
        help="DAVIS 2017: JPEGImages/480p, Annotations/480p, ImageSets/2017/val.txt",
    )
    parser.add_argument(
        "--n_last_frames",
        type=int,
        default=7,
        help="earlier frames that labels come from, besides the first (default: 7)",
    )
    parser.add_argument(
        "--size_mask_neighborhood",
        type=int,
        default=12,
        help="labels come from at most so many patches away; 0: from anywhere (default: 12)",
    )
    parser.add_argument(
        "--topk", type=command.positive, default=5, help="patches a patch takes its label from (default: 5)"
    )
    parser.add_argument(
        "--short_side", type=command.positive, default=480, help="of the frames, in pixels (default: 480)"
    )
    parser.add_argument(
        "--official_std",
        type=command.boolean,
        default=True,
        help="divide red by 0.228 as the official script does, not by 0.229 (default: true)",
    )
    parser.add_argument("--bs", type=command.positive, default=6, help="frames per forward pass (default: 6)")
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads (default: one per core)")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="of the backbone (default: fp32); auto is the fastest 16-bit type that the hardware has",
    )
    parser.add_argument(
        "--evaluate_only", metavar="DIR", help="score the masks DIR/<sequence>/*.png; needs no weights"
    )
    command.output_argument(parser, ".")


def run(flags: argparse.Namespace) -> Result:
    """Under torchrun the processes share the sequences; one of them scores all masks."""
    from fastdino.engine import parallel
    from fastdino.evaluation.davis import davis_videos

    for name in ("n_last_frames", "size_mask_neighborhood"):
        if getattr(flags, name) < 0:
            raise ValueError(f"--{name}: expected 0 or more, got {getattr(flags, name)}")
    videos = davis_videos(Path(flags.data_path))
    folder = Path(flags.evaluate_only or flags.output_dir)
    world = command.world(flags)
    if not flags.evaluate_only:
        _write_masks(flags, videos[world.rank :: world.size], folder)
        parallel.barrier()
    return _scored(flags, videos, folder) if world.main else Result({}, [])


def _write_masks(flags: argparse.Namespace, videos: list[Video], folder: Path) -> None:
    from fastdino.evaluation.davis import OFFICIAL_STD, Propagation, segment, write_labels
    from fastdino.evaluation.features import IMAGENET_STD

    backbone = command.vision_transformer(flags, "whose patch tokens carry the labels")
    how = Propagation(
        flags.n_last_frames,
        flags.size_mask_neighborhood,
        flags.topk,
        flags.short_side,
        OFFICIAL_STD if flags.official_std else IMAGENET_STD,
    )
    for i, video in enumerate(videos, 1):
        with command.progress(f"{video.name} ({i} of {len(videos)})") as progress:
            masks = segment(
                backbone,
                video,
                how,
                device=command.device(flags),
                batch_size=flags.bs,
                num_threads=flags.num_workers,
                dtype=command.precision(flags),
                progress=progress,
            )
        (folder / video.name).mkdir(parents=True, exist_ok=True)
        for frame, mask in zip(video.frames, masks, strict=True):
            write_labels(folder / video.name / f"{frame.stem}.png", mask)


def _scored(flags: argparse.Namespace, videos: list[Video], folder: Path) -> Result:
    """J and F of all masks in ``folder``, and a sheet of pictures per video."""
    import numpy as np

    from fastdino.evaluation.davis import read_labels
    from fastdino.evaluation.segmentation_metrics import score_sequence
    from fastdino.evaluation.sheets import save
    from fastdino.evaluation.video_sheet import video_sheet

    scores: dict[str, SequenceScores] = {}
    pictures = {}
    with command.progress("scores") as progress:
        for video in videos:
            objects = int(read_labels(video.masks[0], void=True).max())
            if not objects:
                raise ValueError(
                    f"--data_path: no object in the first mask of {video.name}: {video.masks[0]}"
                )
            masks = [folder / video.name / f"{frame.stem}.png" for frame in video.frames]
            try:
                scores[video.name] = score_sequence(
                    (read_labels(path) for path in masks[1:-1]),
                    (read_labels(path, void=True) for path in video.masks[1:-1]),
                    objects,
                )
            except ValueError as error:
                raise ValueError(f"{folder / video.name}: {error}") from error
            sheet = f"sheets/{video.name}.png"
            save(video_sheet(video, masks, scores[video.name]), Path(flags.output_dir) / sheet)
            pictures[sheet] = f"{video.name}: carried masks above, true ones below"
            progress(len(scores), len(videos))
    j, f = (
        np.concatenate([getattr(score, name).mean(1) for score in scores.values()]) for name in ("j", "f")
    )
    figures = {"JF": float((j.mean() + f.mean()) / 2), "J": float(j.mean()), "F": float(f.mean())}
    settings = (
        {"evaluate_only": flags.evaluate_only}
        if flags.evaluate_only
        else {
            "image_size": flags.short_side,
            "n_last_frames": flags.n_last_frames,
            "size_mask_neighborhood": flags.size_mask_neighborhood,
            "topk": flags.topk,
            "official_std": flags.official_std,
        }
    )
    return Result(
        figures,
        [
            f"J&F {figures['JF']:.2f}, J {figures['J']:.2f}, F {figures['F']:.2f} "
            f"({len(j)} objects in {len(videos)} sequences)"
        ],
        settings,
        pictures,
        {"sequences": {name: _by_object(score) for name, score in scores.items()}},
    )


def _by_object(score: SequenceScores) -> list[dict[str, float]]:
    """J and F of objects 1, 2, ..., means over frames."""
    means = zip(score.j.mean(1).tolist(), score.f.mean(1).tolist(), strict=True)
    return [{"object": i, "J": j, "F": f} for i, (j, f) in enumerate(means, 1)]
